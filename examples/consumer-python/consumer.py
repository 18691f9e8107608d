"""A service that hears of orders through Postroad: it receives by long poll, does its work once, acknowledges with the next
receive. Python 3.11 or later, the standard library alone: Postroad's API is HTTP and JSON.

    POSTROAD_URL    default http://127.0.0.1:8080
    QUEUE           default mailer
    DATABASE        the service's own database, where it notes what it has done; default mailer.db
    HOLD_SECONDS    how soon another consumer gets a message when this one dies; default 30
    MESSAGES        stop after so many; 0, the default, means until stopped
"""

import http.client
import json
import os
import random
import signal
import sqlite3
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid

BASE = os.environ.get("POSTROAD_URL", "http://127.0.0.1:8080")
QUEUE = "/v1/queues/" + os.environ.get("QUEUE", "mailer")
DATABASE = os.environ.get("DATABASE", "mailer.db")
HOLD_SECONDS = float(os.environ.get("HOLD_SECONDS", "30"))
MESSAGES = int(os.environ.get("MESSAGES", "0"))

stopping = threading.Event()


def call(method: str, path: str, body: dict, timeout: float = 15) -> dict:
    """Calls until there is an answer. Every call may be repeated: receipts and receive ids see to that."""
    data, delay = json.dumps(body).encode(), 0.1
    while True:
        request = urllib.request.Request(BASE + path, data, {"content-type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            # Overload and a broker that restarts pass. Anything else is a mistake of ours, and should be seen.
            if error.code not in (429, 502, 503, 504):
                raise RuntimeError(f"{method} {path}: {error.code} {error.read().decode()}") from error
            problem, pause = error, float(error.headers.get("retry-after", 0))
        except (OSError, http.client.HTTPException) as error:
            problem, pause = error, 0
        pause += delay * random.uniform(0.5, 1)
        delay = min(delay * 2, 5)
        print(f"{problem}; trying again in {pause:.1f} s", file=sys.stderr, flush=True)
        time.sleep(pause)


def settle(verb: str, *deliveries: dict) -> None:
    if deliveries:
        report(call("POST", f"{QUEUE}/{verb}", {"deliveries": deliveries}))


def report(answer: dict) -> None:
    """A 200 stands for the request; each delivery has a result of its own."""
    for item in answer["deliveries"]:
        if item["result"] in ("already_settled", "dead_lettered", "stale", "gone", "blocked", "unknown"):
            print(f"too late: {item['result']}", file=sys.stderr, flush=True)


class Held(threading.Thread):
    """Keeps deliveries while they are worked on, however long that takes, by extending them at a third of their time."""

    def __init__(self, deliveries: list[dict]) -> None:
        super().__init__(daemon=True)
        self.items = [{"receipt": d["receipt"], "visibility_timeout_seconds": HOLD_SECONDS} for d in deliveries]
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(HOLD_SECONDS / 3):
            call("POST", f"{QUEUE}/extend", {"deliveries": self.items})

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def handle(own: sqlite3.Connection, event: dict, attempt: int) -> None:
    """Does the work, once. Delivery is at least once: a consumer that dies between its work and its ack gets the message
    again. So the message's name goes into a table of the service's own, in the transaction of the work."""
    with own:
        try:
            own.execute("insert into handled values (?, ?)", (event["source"], event["id"]))
        except sqlite3.IntegrityError:
            return
        order = event["data"]
        # To see a retry and a slow message: publish an order with one of these members.
        if order.get("fails_once") and attempt == 1:
            raise RuntimeError("the mail server is away")
        time.sleep(order.get("takes_seconds", 0))
        print(f"mail about order {order['order']}: {order.get('quantity')} {order.get('product')}", flush=True)


class Stopped(Exception):
    """Ends a long poll. Raised by a signal only while one waits."""


def receive(acks: list[dict]) -> list[dict]:
    """Receives, and acknowledges what was done since the last time in the same request."""
    body = {"max_messages": 10, "visibility_timeout_seconds": HOLD_SECONDS, "consumer": "consumer-python"}
    body |= {"receive_id": str(uuid.uuid4()), "ack": acks}
    try:
        receive.waits = True
        if stopping.is_set():
            raise Stopped
        answer = call("POST", f"{QUEUE}/receive", body | {"wait_seconds": 20}, timeout=35)
        receive.waits = False
    except Stopped:
        receive.waits = False
        # An answer may have been on its way. The same receive gives it again, and nobody has to wait until it expires.
        answer = call("POST", f"{QUEUE}/receive", body | {"wait_seconds": 0.001, "max_messages": 1})
    if "ack" in answer:
        report(answer["ack"])
    return answer["deliveries"]


receive.waits = False


def stop(*_: object) -> None:
    stopping.set()
    if receive.waits:
        receive.waits = False
        raise Stopped


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    own = sqlite3.connect(DATABASE)
    own.execute("create table if not exists handled (source text, id text, primary key (source, id))")
    call("PUT", QUEUE, {"stream": "main", "topics": ["orders.*"], "start": "earliest"})
    print(f"consuming {QUEUE} of {BASE}", flush=True)
    done, acks = 0, []
    while not stopping.is_set() and (MESSAGES == 0 or done < MESSAGES):
        deliveries = receive(acks)
        acks, begun = [], 0
        with Held(deliveries):
            for delivery in deliveries:
                if stopping.is_set():
                    break
                begun += 1
                try:
                    handle(own, delivery["event"], delivery["attempt"])
                    acks.append({"receipt": delivery["receipt"]})
                except Exception as error:
                    # Comes again after the delay of the queue's retry policy; after the last attempt it is a dead letter.
                    settle("nack", {"receipt": delivery["receipt"], "reason": repr(error)[:200]})
        done += len(acks)
        # Not begun: somebody else can have them at once, and the attempt does not count.
        settle("release", *({"receipt": delivery["receipt"]} for delivery in deliveries[begun:]))
    settle("ack", *acks)
    print(f"stopped after {done} messages", flush=True)


if __name__ == "__main__":
    main()
