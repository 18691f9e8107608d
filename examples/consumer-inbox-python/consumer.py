"""A service that does each message's work exactly once: it books orders in its own database.

Delivery is at least once: who dies between the commit and the acknowledgement gets the message again. So the message is
recorded in the inbox by the transaction that does the work, and a message that the inbox knows is only acknowledged.

    POSTROAD_URL    default http://127.0.0.1:8080
    DATABASE_URL    this service's own database, with the inbox: postroad install --inbox --database-url ...
    QUEUE           default booking
    MESSAGES        stop after so many were acknowledged; 0, the default, means until stopped
    DIE_AT          for trying it out: `before-commit` or `before-ack`, and the process is gone there
"""

import json
import os
import signal
import sys
import urllib.request

import psycopg

BASE = os.environ.get("POSTROAD_URL", "http://127.0.0.1:8080")
DATABASE_URL = os.environ["DATABASE_URL"]
QUEUE = os.environ.get("QUEUE", "booking")
MESSAGES = int(os.environ.get("MESSAGES", "0"))
DIE_AT = os.environ.get("DIE_AT")


def call(method: str, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        BASE + path, json.dumps(body).encode(), {"content-type": "application/json"}, method=method
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def die(step: str) -> None:
    if DIE_AT == step:
        os.kill(os.getpid(), signal.SIGKILL)


def handle(connection: psycopg.Connection, delivery: dict) -> None:
    event = delivery["event"]
    with connection.transaction():
        (is_new,) = connection.execute(
            "select postroad.inbox_accept(%s, %s, %s, %s)", (QUEUE, event["source"], event["id"], delivery["offset"])
        ).fetchone()
        if is_new:
            connection.execute("insert into example_booking (message) values (%s)", (event["id"],))
        die("before-commit")
    print(f"{'booked' if is_new else 'known '} {event['id']}", flush=True)


def main() -> None:
    call("PUT", f"/v1/queues/{QUEUE}", {"stream": "main", "topics": ["orders.*"], "start": "earliest"})
    done = 0
    with psycopg.connect(DATABASE_URL, autocommit=True) as connection:
        connection.execute("create table if not exists example_booking (message text not null)")
        while MESSAGES == 0 or done < MESSAGES:
            received = call(
                "POST", f"/v1/queues/{QUEUE}/receive", {"wait_seconds": 20, "visibility_timeout_seconds": 2, "max_messages": 10}
            )
            for delivery in received["deliveries"]:
                handle(connection, delivery)
                die("before-ack")
                # Safe to repeat: the same receipt gives the same answer.
                call("POST", f"/v1/queues/{QUEUE}/ack", {"deliveries": [{"receipt": delivery["receipt"]}]})
                done += 1


if __name__ == "__main__":
    sys.exit(main())
