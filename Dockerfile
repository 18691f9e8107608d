# syntax=docker/dockerfile:1
FROM rust:1.95-bookworm AS build
WORKDIR /build
COPY rust-toolchain.toml Cargo.toml Cargo.lock ./
COPY src src
COPY migrations migrations
COPY docs docs
COPY openapi.yam[l] ./
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/build/target \
    cargo build --release --locked --bin postroad && cp target/release/postroad /postroad

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --no-create-home postroad
COPY --from=build /postroad /usr/local/bin/postroad
USER 10001
# All addresses: whoever reaches the port may publish, receive, purge and delete, since nobody signs in. Publish it to those alone
# who may: `-p 127.0.0.1:8080:8080`, a network of its own, a proxy that signs in. The start says so in the log.
ENV POSTROAD_BIND=0.0.0.0:8080 POSTROAD_LOG_FORMAT=json
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=6s --start-period=30s --retries=5 CMD ["postroad", "healthcheck"]
ENTRYPOINT ["postroad"]
CMD ["serve"]
