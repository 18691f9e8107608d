"""The official CloudEvents SDK of Python, publishing to a broker and reading from it. The broker's URL is the argument."""

import json
import sys
import urllib.request
from datetime import datetime, timezone

from cloudevents.core.bindings.http import HTTPMessage, from_structured_event, to_binary_event, to_structured_event
from cloudevents.core.v1.event import CloudEvent

BASE = sys.argv[1]
QUEUE = "sdk-python"


def send(method: str, path: str, body: bytes, headers: dict) -> dict:
    request = urllib.request.Request(BASE + path, body, headers, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def call(method: str, path: str, body: dict) -> dict:
    return send(method, path, json.dumps(body).encode(), {"content-type": "application/json"})


def event(number: int, data, content_type: str) -> CloudEvent:
    attributes = {
        "id": f"python-{number}",
        "source": "/sdk/python",
        "type": "sdk.tested",
        "specversion": "1.0",
        "subject": "Euro € 😀",
        "time": datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=timezone.utc),
        "datacontenttype": content_type,
        "partitionkey": "k",
        "comexample": "a \"b\" % c",
    }
    return CloudEvent(attributes, data)


PAYLOADS = [
    ({"a": [1, None, "é"]}, "application/json"),
    ("text é", "text/plain"),
    (b"\x00\xff", "application/octet-stream"),
]

call("PUT", f"/v1/queues/{QUEUE}", {"stream": "main", "topics": ["sdk.python"], "start": "earliest"})
sent = []
for data, content_type in PAYLOADS:
    for encode in (to_binary_event, to_structured_event):
        sent.append(event(len(sent), data, content_type))
        message = encode(sent[-1])
        published = send("POST", "/v1/topics/sdk.python/messages", message.body, message.headers)
        assert published["messages"][0]["id"] == sent[-1].get_id(), published
batch = [event(len(sent) + number, data, content_type) for number, (data, content_type) in enumerate(PAYLOADS)]
body = b"[" + b",".join(to_structured_event(item).body for item in batch) + b"]"
send("POST", "/v1/topics/sdk.python/messages", body, {"content-type": "application/cloudevents-batch+json"})
sent += batch

received = []
while len(received) < len(sent):
    answer = call("POST", f"/v1/queues/{QUEUE}/receive", {"wait_seconds": 20, "max_messages": 100})
    deliveries = answer["deliveries"]
    assert deliveries, answer
    for delivery in deliveries:
        structured = {"content-type": "application/cloudevents+json"}
        received.append(from_structured_event(HTTPMessage(structured, json.dumps(delivery["event"]).encode())))
    call("POST", f"/v1/queues/{QUEUE}/ack", {"deliveries": [{"receipt": d["receipt"]} for d in deliveries]})

for expected, found in zip(sent, received):
    assert found.get_attributes() == expected.get_attributes(), (expected.get_attributes(), found.get_attributes())
    assert found.get_data() == expected.get_data(), (expected.get_data(), found.get_data())
print(f"{len(sent)} events of the Python SDK came back as they were")
