#!/usr/bin/env bash
# Gives openapi.yaml to two strict validators and three generators of clients, and compiles the clients that they make. Needs python3
# with venv, node and npm; the tools come from PyPI and npm at the versions below.
set -euo pipefail
cd "$(dirname "$0")/.."

spec=${SPEC:-$PWD/openapi.yaml}
folder=$(mktemp -d "${TMPDIR:-/tmp}/postroad-openapi.XXXXXX")
trap 'rm -rf "$folder"' EXIT

python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check openapi-spec-validator==0.9.0 openapi-python-client==0.29.1
(cd "$folder" && npm install --silent --no-fund --no-audit \
    openapi-typescript@7.13.0 @hey-api/openapi-ts@0.95.0 @redocly/cli@2.77.0 typescript@5.9.3 >/dev/null)
PATH=$folder/venv/bin:$folder/node_modules/.bin:$PATH
export REDOCLY_TELEMETRY=off

step() { echo "== $1"; }
# Every name that the description gives an operation is a function of the client.
operations() { sed -n 's/^ *operationId: //p' "$spec"; }
camel() { sed -E 's/_([a-z])/\U\1/g'; }

step "openapi-spec-validator"
openapi-spec-validator "$spec"

step "redocly, its recommended rules"
redocly lint --extends=recommended "$spec"

step "openapi-typescript, and its types compiled"
openapi-typescript "$spec" -o "$folder/types.ts" >/dev/null
tsc --noEmit --strict "$folder/types.ts"

step "@hey-api/openapi-ts, and its client compiled"
openapi-ts -i "$spec" -o "$folder/hey" -c @hey-api/client-fetch >/dev/null
tsc --noEmit --strict --skipLibCheck --target es2022 --lib es2022,dom,dom.iterable --module esnext --moduleResolution bundler "$folder/hey/index.ts"
for operation in $(operations | camel); do
    grep -q "export const $operation = " "$folder/hey/sdk.gen.ts" || { echo "no function $operation in the client" >&2; exit 1; }
done

step "openapi-python-client, and its client compiled"
# It knows neither YAML answers nor plain text beside JSON in one body, and says so: two warnings, and no more.
openapi-python-client generate --path "$spec" --meta none --output-path "$folder/python" >"$folder/said" 2>&1 ||
    { cat "$folder/said" >&2; exit 1; }
warnings=$(grep -c "^WARNING" "$folder/said" || true)
[ "$warnings" -le 2 ] || { cat "$folder/said" >&2; exit 1; }
"$folder/venv/bin/python" -m compileall -q "$folder/python"
for operation in $(operations); do
    find "$folder/python/api" -name "$operation.py" | grep -q . || { echo "no function $operation in the client" >&2; exit 1; }
done

echo "openapi.yaml: $(operations | wc -l) operations, fit for all of them"
