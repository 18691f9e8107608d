#!/usr/bin/env bash
# One message's way from a transaction to an acknowledged delivery, a command a step. Needs psql, curl and sed.
#   DATABASE_URL    the Postgres that the broker uses
#   POSTROAD_URL    default http://127.0.0.1:8080
set -euo pipefail

: "${DATABASE_URL:?set it to the URL of the broker\'s Postgres}"
base=${POSTROAD_URL:-http://127.0.0.1:8080}
queue=tour

post() { # path, body
    curl --silent --show-error --fail-with-body --data "$2" "$base$1"
}

echo "1. Declare a queue: every message whose topic is orders.<one word>, from now on."
curl --silent --show-error --fail-with-body --request PUT \
    --data '{"stream": "main", "topics": ["orders.*"], "start": "latest"}' "$base/v1/queues/$queue"
echo

echo "2. Send a message by a transaction, and none by one that is rolled back."
psql "$DATABASE_URL" --quiet --set ON_ERROR_STOP=1 <<'SQL'
begin;
-- your own business rows go here
insert into postroad.outbox (topic, key, payload) values ('orders.created', 'customer-7', '{"order": 1, "total": 42.50}');
commit;

begin;
insert into postroad.outbox (topic, key, payload) values ('orders.created', 'customer-7', '{"order": 2, "total": 0}');
rollback;
SQL

echo "3. Receive. The broker holds the request until there is a message, 10 seconds at most."
delivery=$(post "/v1/queues/$queue/receive" '{"wait_seconds": 10, "max_messages": 1}')
echo "$delivery"
receipt=$(sed -n 's/.*"receipt": *"\([^"]*\)".*/\1/p' <<<"$delivery")
[ -n "$receipt" ] || { echo "nothing was received" >&2; exit 1; }

echo "4. Acknowledge it: it will not come again."
post "/v1/queues/$queue/ack" "{\"deliveries\": [{\"receipt\": \"$receipt\"}]}"
echo

echo "5. Nothing more comes: the rolled-back message was never sent."
post "/v1/queues/$queue/receive" '{"wait_seconds": 0}'
echo
