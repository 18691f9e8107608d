#!/usr/bin/env bash
# Rust needs a C compiler to link with, and one dependency has a little C in it.
set -euo pipefail
if command -v cc >/dev/null; then exit 0; fi
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "ensure-compiler: installing gcc by apt-get" >&2
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq >&2
    apt-get install -y -qq --no-install-recommends gcc libc6-dev >&2
    exit 0
fi
echo "ensure-compiler: no C compiler (cc): install gcc or clang, on Debian \`apt-get install gcc libc6-dev\`" >&2
exit 1
