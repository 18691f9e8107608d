# `make` lists the commands. Postgres is found, or installed, by those that need it; DATABASE_URL is used when it is set.

SHELL := /usr/bin/env bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Runs what follows with a Postgres at hand.
WITH_POSTGRES = scripts/ensure-compiler.sh; postgres=$$(scripts/ensure-postgres.sh); eval "$$postgres";
# Arguments for the demo: make demo ARGS="--orders 20000 --producers 8"
ARGS ?=

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|' 2>/dev/null \
		|| grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST)

.PHONY: demo
demo: ## Run a small shop through the broker and count what was lost (nothing)
	@$(WITH_POSTGRES) cargo run --release --quiet -- demo $(ARGS)

.PHONY: run
run: ## Run the broker, on a private local Postgres unless DATABASE_URL is set
	@$(WITH_POSTGRES) cargo run --release --quiet -- serve $(ARGS)

.PHONY: test
test: ## Run all tests
	@$(WITH_POSTGRES) cargo test --features failpoints $(ARGS)

.PHONY: mutants
mutants: ## Plant each fault of docs/reliability.md and see the test that is to find it fail: make mutants ARGS="order-by-xid"
	@$(WITH_POSTGRES) scripts/mutants.sh $(ARGS)

.PHONY: soak
soak: ## Run the long tests at full size on a release build, and print their figures (half an hour or so)
	@$(WITH_POSTGRES) cargo build --release --quiet; \
	POSTROAD_TEST_PROGRAM="$$PWD/target/release/postroad" POSTROAD_SOAK_BACKLOG=1000000 POSTROAD_SOAK_HELD_SECONDS=120 \
	POSTROAD_SOAK_HELD_RATE=2000 POSTROAD_SOAK_AGE=20000 POSTROAD_SOAK_PGBENCH_SECONDS=30 \
	POSTROAD_SOAK_KEY_WAITING=2000000 POSTROAD_SOAK_KEY_OTHERS=100000 POSTROAD_SOAK_KEY_ROUNDS=6 POSTROAD_SOAK_LOW=1000000 POSTROAD_SOAK_HIGH=100 POSTROAD_SOAK_READERS=1000 POSTROAD_SOAK_READER_MESSAGES=10000 \
	POSTROAD_SOAK_POLLS=10000 POSTROAD_SOAK_QUEUES=10000 POSTROAD_SOAK_QUEUES_MESSAGES=20000 POSTROAD_SOAK_ACTIVE=1000 \
	POSTROAD_SOAK_HISTORY=100000 POSTROAD_SOAK_STUCK=2000000 POSTROAD_SOAK_KEYED=10000000 POSTROAD_SOAK_KEYED_BATCHES=250 POSTROAD_SOAK_DUE=100000 POSTROAD_SOAK_INSTANT=1000000 \
	cargo test --test it soak:: -- --nocapture --test-threads 1

.PHONY: torture
torture: ## Run nodes, producers and consumers under faults drawn by a seed, and judge what came of it: make torture ARGS=torture::kills
	@$(WITH_POSTGRES) \
	export POSTROAD_TORTURE_SECONDS=$${POSTROAD_TORTURE_SECONDS:-300} POSTROAD_TORTURE_KILLS=$${POSTROAD_TORTURE_KILLS:-200} \
	POSTROAD_TORTURE_PAUSES=$${POSTROAD_TORTURE_PAUSES:-100} POSTROAD_TORTURE_POINTS=$${POSTROAD_TORTURE_POINTS:-1000} \
	POSTROAD_TORTURE_DISKS=$${POSTROAD_TORTURE_DISKS:-9} POSTROAD_TORTURE_CLOCKS=$${POSTROAD_TORTURE_CLOCKS:-20} POSTROAD_TORTURE_ORIGINS=$${POSTROAD_TORTURE_ORIGINS:-2}; \
	cargo test --features failpoints --test it $(if $(strip $(ARGS)),$(ARGS),torture::) -- --nocapture --test-threads 1

.PHONY: bench
bench: ## Measure the broker on a private Postgres, beside a queue made from a table: make bench ARGS="latency"
	@$(WITH_POSTGRES) cargo run --release --quiet -- bench $(if $(strip $(ARGS)),$(ARGS),outbox --batch 100 --baseline)

.PHONY: check-openapi
check-openapi: ## Give openapi.yaml to strict validators and to generators of clients (needs python3 and node; packages are fetched)
	@scripts/check-openapi.sh

.PHONY: check-api
check-api: ## Run schemathesis over the API of a broker of its own (needs python3; a few minutes)
	@$(WITH_POSTGRES) cargo build --release --quiet; scripts/check-api.sh --max-time 180

.PHONY: check-clients
check-clients: ## Run the official CloudEvents SDKs and the examples in other languages (needs python3 and node; packages are fetched)
	@$(WITH_POSTGRES) scripts/check-clients.sh

.PHONY: check-upgrade
check-upgrade: ## Run another revision's program beside the present one, under load: make check-upgrade ARGS=v0.1.0 (HEAD~1 without)
	@$(WITH_POSTGRES) scripts/upgrade-test.sh $(ARGS)

.PHONY: check
check: ## Run what has to pass before a change lands: format, lints, docs, tests, drift, dependencies
	cargo fmt --all --check
	cargo clippy --all-targets --all-features -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --document-private-items --quiet
	@$(MAKE) --no-print-directory test
	@if command -v cargo-deny >/dev/null; then cargo deny --log-level error check bans licenses sources; else echo "cargo-deny is not installed: skipped"; fi
	@if command -v cargo-machete >/dev/null; then cargo machete; else echo "cargo-machete is not installed: skipped"; fi

.PHONY: fmt
fmt: ## Format the code
	cargo fmt --all

.PHONY: golden
golden: ## Rewrite what tests compare with: openapi.yaml, tests/it/golden, the table of docs/configuration.md
	@$(WITH_POSTGRES) UPDATE_GOLDEN=1 cargo test --test it golden

.PHONY: openapi
openapi: ## Rewrite openapi.yaml from the code
	cargo run --quiet -- openapi > openapi.yaml.new && mv openapi.yaml.new openapi.yaml

.PHONY: install-postgres
install-postgres: ## Find a Postgres server, or install one
	@scripts/ensure-postgres.sh >/dev/null && echo "a Postgres server is at hand"

.PHONY: docker
docker: ## Build the image postroad
	docker build --tag postroad .
