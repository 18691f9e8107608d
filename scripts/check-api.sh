#!/usr/bin/env bash
# Runs schemathesis over openapi.yaml against a broker of its own on a data folder of its own, and stops both. Needs python3 with
# venv; schemathesis comes from PyPI at the version below. PROGRAM names the broker's program (default: a release build).
set -euo pipefail
cd "$(dirname "$0")/.."

version=4.32.5
program=${PROGRAM:-target/release/postroad}
examples=${EXAMPLES:-20}
seed=${SEED:-1}
folder=$(mktemp -d "${TMPDIR:-/tmp}/postroad-api.XXXXXX")
chmod 755 "$folder"
broker=
trap 'if [ -n "$broker" ]; then kill "$broker" 2>/dev/null || true; wait "$broker" 2>/dev/null || true; fi; rm -rf "$folder"' EXIT

tool=${SCHEMATHESIS:-}
if [ -z "$tool" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$version"
    tool=$folder/venv/bin/schemathesis
fi

POSTROAD_LOG_FORMAT=json "$program" serve --bind 127.0.0.1:0 --data-dir "$folder/data" 2>"$folder/log" &
broker=$!
url=
for _ in $(seq 300); do
    url=$(sed -n 's/.*"postroad is ready".*"url":"\([^"]*\)".*/\1/p; s/.*"url":"\([^"]*\)".*"postroad is ready".*/\1/p' "$folder/log" | head -n 1)
    [ -z "$url" ] || break
    kill -0 "$broker" 2>/dev/null || { cat "$folder/log" >&2; exit 1; }
    sleep 0.1
done

# Something to be found under the names that the specification's examples have: messages in every state, dead letters, a
# redrive, a paused queue. Whatever of it the run changes, it was there.
call() { curl -sS --fail-with-body -o "$folder/answer" -X "$1" -H 'content-type: application/json' "$url$2" ${3:+-d "$3"}; }
receipts() { python3 -c 'import json, sys; print(json.dumps([{"receipt": d["receipt"], "reason": "no stock"} for d in json.load(open(sys.argv[1]))["deliveries"]]))' "$folder/answer"; }
call PUT /v1/queues/billing '{"topics": ["orders.*"], "ordering": "key", "hold_key": true}'
call PUT /v1/queues/gone '{"topics": ["orders.*"]}'
for number in $(seq 30); do
    curl -sS --fail-with-body -o "$folder/answer" -H 'content-type: application/json' \
        -H "ce-partitionkey: customer-$((number % 9))" "$url/v1/topics/orders.created/messages" -d "{\"n\": $number}"
done
for verb in reject nack; do
    call POST /v1/queues/billing/receive '{"max_messages": 9, "wait_seconds": 5, "consumer": "billing-1"}'
    call POST "/v1/queues/billing/$verb" "{\"deliveries\": $(receipts)}"
    call POST /v1/queues/billing/redrives '{"redrive_id": "after-the-fix", "ids": ["1-1"]}'
done
call POST /v1/queues/gone/receive '{"max_messages": 9, "wait_seconds": 5}'
call POST /v1/queues/gone/pause
# A keyed stream with some histories, messages that are to come in every state, a schedule, a topic that takes not everything.
call PUT /v1/streams/accounts '{"topics": ["accounts.>"], "keyed": true}'
call PUT /v1/streams/gone '{"topics": ["gone"]}'
call PUT /v1/topics/accounts.opened '{"schema": {"type": "object"}, "max_bytes": 65536}'
for version in $(seq 0 9); do
    for key in customer-7 customer/8; do
        call POST /v1/messages "{\"messages\": [{\"topic\": \"accounts.opened\", \"key\": \"$key\", \"expected_version\": $version, \"data\": {}}]}"
    done
done
call PUT /v1/schedules/daily-report '{"topic": "reports.daily", "cron": "0 9 * * *", "time_zone": "Europe/Berlin"}'
call PUT /v1/schedules/each-second '{"topic": "reports.ticks", "cron": "* * * * * *", "event": {"data": {"n": 1}}}'
scheduled() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["messages"][0]["scheduled"]["id"])' "$folder/answer"; }
ids=
for seconds in 1 1 1 3600 3600 3600 7200; do
    call POST /v1/messages "{\"messages\": [{\"topic\": \"orders.reminder\", \"key\": \"customer-7\", \"deliver_at\": \"$(date -u -d "+$seconds seconds" +%FT%TZ)\", \"data\": 1}]}"
    # The first can have become due on the way.
    grep -q '"scheduled":{' "$folder/answer" || continue
    id=$(scheduled)
    ids="$ids${ids:+, }\"$id\""
done
call DELETE "/v1/scheduled-messages/$id"
# Half of the time these names are asked for.
cat >"$folder/schemathesis.toml" <<TOML
[dictionaries]
streams = { values = ["main", "accounts", "gone"] }
keys = { values = ["customer-7", "customer/8"] }
schedules = { values = ["daily-report", "each-second"] }
scheduled = { values = [$ids] }
[[operations]]
include-path-regex = "/v1/streams/.*"
parameters = { "path.stream" = { dictionary = "streams", probability = 0.5 }, "path.key" = { dictionary = "keys", probability = 0.5 } }
[[operations]]
include-path = "/v1/schedules/{name}"
parameters = { "path.name" = { dictionary = "schedules", probability = 0.5 } }
[[operations]]
include-path = "/v1/scheduled-messages/{id}"
parameters = { "path.id" = { dictionary = "scheduled", probability = 0.5 } }
# A cancelled message or redrive is remembered as such.
checks = { use_after_free = { enabled = false } }
[[operations]]
include-path = "/v1/queues/{queue}/redrives/{id}"
checks = { use_after_free = { enabled = false } }
TOML

# What the specification cannot say: which values of an open text are valid (a topic's pattern, a cursor, two parameters that
# exclude each other), so valid-looking data may be refused with 422.
status=0
"$tool" --config-file "$folder/schemathesis.toml" run "$url/openapi.yaml" --seed "$seed" --max-examples "$examples" --request-timeout 70 --workers 4 \
    --exclude-checks positive_data_acceptance --continue-on-failure "$@" || status=$?
if grep -qE '"level":"ERROR"|panicked' "$folder/log"; then
    echo "the broker logged errors:" >&2
    grep -E '"level":"ERROR"|panicked' "$folder/log" | head -n 20 >&2
    status=1
fi
exit "$status"
