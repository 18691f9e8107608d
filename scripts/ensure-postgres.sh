#!/usr/bin/env bash
# Makes sure that a Postgres server can be started here, and installs one if need be. Prints the environment that goes with
# it, for `eval`; everything else goes to standard error.
#
#   DATABASE_URL set          nothing to do
#   found                     where the packages of Debian, Homebrew and the RPM systems put it, or on PATH
#   root on Debian or Ubuntu  apt-get installs the server, without a cluster of its own
#   others there              apt-get downloads the same packages and they are unpacked in a folder of the user's
#   macOS with Homebrew       brew installs it
set -euo pipefail

say() { echo "ensure-postgres: $*" >&2; }

[ -z "${DATABASE_URL:-}" ] || exit 0

home=${XDG_DATA_HOME:-${HOME:-/tmp}/.local/share}/postroad-postgres

# The folders that hold an installation, newest last.
folders() {
    if [ -n "${POSTROAD_POSTGRES_BIN:-}" ]; then echo "$POSTROAD_POSTGRES_BIN"; return; fi
    ls -d /opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin /home/linuxbrew/.linuxbrew/opt/postgresql*/bin \
        /usr/pgsql-*/bin /usr/local/pgsql*/bin /Applications/Postgres.app/Contents/Versions/*/bin \
        /usr/lib/postgresql/*/bin 2>/dev/null | sort -V || true
    dirname "$(command -v postgres 2>/dev/null || echo /nowhere/postgres)"
}

found() {
    folders | while read -r folder; do
        if [ -x "$folder/postgres" ] && [ -x "$folder/initdb" ]; then echo "$folder"; fi
    done | tail -n 1
}

unpacked() { ls -d "$home"/root/usr/lib/postgresql/*/bin 2>/dev/null | sort -V | tail -n 1; }

print_unpacked() {
    local libraries
    libraries=$(find "$home/root" -name '*.so.*' -path '*/lib/*' ! -path '*/postgresql/*' -printf '%h\n' | sort -u | paste -sd:)
    printf 'export POSTROAD_POSTGRES_BIN=%q LD_LIBRARY_PATH=%q\n' "$(unpacked)" "$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
}

newest_package() {
    apt-cache "$@" search --names-only '^postgresql-[0-9]+$' | sed 's/ .*//' | sort -V | tail -n 1
}

install_as_root() {
    say "installing the Postgres server by apt-get"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2
    # Only the programs are wanted: no cluster is made and none is started.
    mkdir -p /etc/postgresql-common/createcluster.d
    echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.d/postroad.conf
    apt-get install -y -qq --no-install-recommends "$(newest_package)" >&2
}

install_as_user() {
    say "unpacking the Postgres server in $home, since only root can install it"
    mkdir -p "$home/lists/partial" "$home/cache" "$home/archives/partial" "$home/log"
    local options=(-o "Dir::State::Lists=$home/lists" -o "Dir::Cache=$home/cache" -o "Dir::Cache::archives=$home/archives"
        -o "Dir::Log=$home/log" -o Debug::NoLocking=1)
    # The hooks of Docker's images complain that they may not clean root's caches: shown only if something fails.
    if ! {
        apt-get "${options[@]}" update -qq &&
        apt-get "${options[@]}" install -y -qq --no-install-recommends --download-only "$(newest_package "${options[@]}")"
    } >"$home/apt.log" 2>&1; then
        tail -n 20 "$home/apt.log" >&2
        return 1
    fi
    rm -rf "$home/root.new" && mkdir -p "$home/root.new"
    for package in "$home"/archives/*.deb; do dpkg -x "$package" "$home/root.new"; done
    rm -rf "$home/root" && mv "$home/root.new" "$home/root"
    rm -rf "$home/archives" "$home/cache" "$home/lists" "$home/log"
}

if [ -n "$(found)" ]; then exit 0; fi
if [ -n "$(unpacked)" ]; then print_unpacked; exit 0; fi

if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    install_as_root
elif command -v apt-get >/dev/null; then
    install_as_user
    print_unpacked
    exit 0
elif command -v brew >/dev/null; then
    say "installing postgresql@17 by Homebrew"
    brew install --quiet postgresql@17 >&2
fi

if [ -z "$(found)" ]; then
    say "no Postgres server here and no way to install one: install your system's package postgresql-server, or set DATABASE_URL to a running server"
    exit 1
fi
