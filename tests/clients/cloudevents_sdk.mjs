// The official CloudEvents SDK of JavaScript, publishing to a broker and reading from it. The broker's URL is the argument.

import assert from "node:assert/strict";
import { CloudEvent, HTTP } from "cloudevents";

const base = process.argv[2];
const queue = "sdk-node";

async function send(method, path, body, headers) {
  const answer = await fetch(base + path, { method, body, headers });
  const text = await answer.text();
  assert.ok(answer.ok, `${method} ${path}: ${answer.status} ${text}`);
  return JSON.parse(text);
}
const call = (method, path, body) => send(method, path, JSON.stringify(body), { "content-type": "application/json" });

const event = (number, data, datacontenttype) =>
  new CloudEvent({
    id: `node-${number}`,
    source: "/sdk/node",
    type: "sdk.tested",
    subject: "a subject",
    time: "2026-01-02T03:04:05.678Z",
    datacontenttype,
    data,
    partitionkey: "k",
    comexample: "a b",
    sequence: "7",
  });

const payloads = [
  [{ a: [1, null, "é"] }, "application/json"],
  ["text é", "text/plain"],
  [new Uint8Array([0, 255]), "application/octet-stream"],
];

await call("PUT", `/v1/queues/${queue}`, { stream: "main", topics: ["sdk.node"], start: "earliest" });
const sent = [];
for (const [data, type] of payloads) {
  for (const encode of [HTTP.binary, HTTP.structured]) {
    const next = event(sent.length, data, type);
    const message = encode(next);
    const published = await send("POST", "/v1/topics/sdk.node/messages", message.body, message.headers);
    assert.equal(published.messages[0].id, next.id);
    sent.push(next);
  }
}
const batch = payloads.map(([data, type], number) => event(sent.length + number, data, type));
const body = `[${batch.map((item) => HTTP.structured(item).body).join(",")}]`;
await send("POST", "/v1/topics/sdk.node/messages", body, { "content-type": "application/cloudevents-batch+json" });
sent.push(...batch);

const received = [];
while (received.length < sent.length) {
  const { deliveries } = await call("POST", `/v1/queues/${queue}/receive`, { wait_seconds: 20, max_messages: 100 });
  assert.ok(deliveries.length > 0, "nothing came");
  for (const delivery of deliveries) {
    const headers = { "content-type": "application/cloudevents+json" };
    received.push(HTTP.toEvent({ headers, body: JSON.stringify(delivery.event) }));
  }
  await call("POST", `/v1/queues/${queue}/ack`, { deliveries: deliveries.map(({ receipt }) => ({ receipt })) });
}

// The SDK reads bytes back as another kind of array.
const bytes = (data) => (ArrayBuffer.isView(data) ? [...data] : data);
sent.forEach((expected, number) => {
  const found = received[number];
  for (const name of ["id", "source", "type", "subject", "time", "datacontenttype", "partitionkey", "comexample", "sequence"]) {
    assert.equal(found[name], expected[name], `${name} of ${expected.id}`);
  }
  assert.deepEqual(bytes(found.data), bytes(expected.data), `data of ${expected.id}`);
});
console.log(`${sent.length} events of the JavaScript SDK came back as they were`);
