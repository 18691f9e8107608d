#!/usr/bin/env bash
# Runs what others would run against the broker: the official CloudEvents SDKs of Python and JavaScript, and the examples in
# Python, TypeScript and Java. Fetches their packages from PyPI and npm into target/clients; what cannot be had is skipped, and
# said so. Java needs a JDK and the driver of Debian's libpostgresql-jdbc-java (JDBC_JAR names another).
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$PWD/target/clients
mkdir -p "$folder/node"
if python3 -m venv "$folder/python" \
    && "$folder/python/bin/pip" install --quiet --disable-pip-version-check 'cloudevents==2.2.0' 'sqlalchemy>=2,<3' 'psycopg[binary]>=3.2,<4'; then
    export PYTHON=$folder/python/bin/python
else
    echo "SKIPPED: the Python packages are not to be had" >&2
fi
if (cd "$folder/node" && npm install --silent --no-audit --no-fund --no-save cloudevents@10.0.0 pg@8 tsx@4); then
    export POSTROAD_TEST_NODE=$folder/node
else
    echo "SKIPPED: the packages of npm are not to be had" >&2
fi
exec cargo test --test it -- --nocapture clients:: examples::
