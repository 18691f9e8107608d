// A service that hears of orders through Postroad: it receives by long poll, does its work, acknowledges with the next
// receive. Node 20 or later, nothing but its standard library at run time: Postroad's API is HTTP and JSON.
//
//   POSTROAD_URL    default http://127.0.0.1:8080
//   QUEUE           default mailer
//   HOLD_SECONDS    how soon another consumer gets a message when this one dies; default 30
//   MESSAGES        stop after so many; 0, the default, means until stopped

import { randomUUID } from "node:crypto";
import { setTimeout as pause } from "node:timers/promises";

interface Event {
  id: string;
  source: string;
  data: { order: string | number; product?: string; quantity?: number; fails_once?: boolean; takes_seconds?: number };
}

interface Delivery {
  receipt: string;
  attempt: number;
  event: Event;
}

type Item = { receipt: string; reason?: string; visibility_timeout_seconds?: number };
type Settled = { settled: number; refused: number; deliveries: { receipt: string; result: string }[] };
type Received = { ack?: Settled; deliveries: Delivery[]; reason?: string };

const base = process.env.POSTROAD_URL ?? "http://127.0.0.1:8080";
const queue = `/v1/queues/${process.env.QUEUE ?? "mailer"}`;
const holdSeconds = Number(process.env.HOLD_SECONDS ?? 30);
const wanted = Number(process.env.MESSAGES ?? 0);

const stop = new AbortController();
for (const signal of ["SIGINT", "SIGTERM"] as const) process.on(signal, () => stop.abort());

/** A refusal that a repeat cannot help: a mistake of ours, and it should be seen. */
class Refused extends Error {}

/** Calls until there is an answer. Every call may be repeated: receipts and receive ids see to that. */
async function call<T>(method: string, path: string, body: unknown, signal?: AbortSignal): Promise<T> {
  for (let delay = 100; ; delay = Math.min(delay * 2, 5000)) {
    let seconds = 0;
    let why: string;
    try {
      const answer = await fetch(base + path, {
        method,
        headers: { "content-type": "application/json" },
        body: JSON.stringify(body),
        signal: signal ?? null,
      });
      if (answer.ok) return (await answer.json()) as T;
      why = `${method} ${path}: ${answer.status} ${await answer.text()}`;
      // Overload and a broker that restarts pass.
      if (![429, 502, 503, 504].includes(answer.status)) throw new Refused(why);
      seconds = Number(answer.headers.get("retry-after") ?? 0);
    } catch (error) {
      if (signal?.aborted || error instanceof Refused) throw error;
      why = String(error);
    }
    const wait = seconds * 1000 + delay * (0.5 + Math.random() / 2);
    console.error(`${why}; trying again in ${Math.round(wait)} ms`);
    await pause(wait, undefined, { signal });
  }
}

async function settle(verb: "ack" | "nack" | "extend" | "release", deliveries: Item[]): Promise<void> {
  if (deliveries.length > 0) report(await call<Settled>("POST", `${queue}/${verb}`, { deliveries }));
}

/** A 200 stands for the request; each delivery has a result of its own. */
function report(answer: Settled): void {
  const late = ["already_settled", "dead_lettered", "stale", "gone", "blocked", "unknown"];
  for (const { result } of answer.deliveries) if (late.includes(result)) console.error(`too late: ${result}`);
}

/** Keeps deliveries while they are worked on, however long that takes, by extending them at a third of their time. */
async function held<T>(deliveries: Delivery[], work: () => Promise<T>): Promise<T> {
  const items = deliveries.map(({ receipt }) => ({ receipt, visibility_timeout_seconds: holdSeconds }));
  const beat = setInterval(() => {
    settle("extend", items).catch((error) => console.error(String(error)));
  }, (holdSeconds / 3) * 1000);
  try {
    return await work();
  } finally {
    clearInterval(beat);
  }
}

// Delivery is at least once: a consumer that dies between its work and its ack gets the message again. So the work must
// not do harm when it is done twice. Here a set stands for that; a service with a database inserts (source, id) into a
// table of its own, in the transaction of the work, and skips what is there already.
const handled = new Set<string>();

async function handle({ source, id, data }: Event, attempt: number): Promise<void> {
  const name = `${source} ${id}`;
  if (handled.has(name)) return;
  // To see a retry and a slow message: publish an order with one of these members.
  if (data.fails_once && attempt === 1) throw new Error("the mail server is away");
  await pause((data.takes_seconds ?? 0) * 1000);
  console.log(`mail about order ${data.order}: ${data.quantity} ${data.product}`);
  handled.add(name);
}

/** Receives, and acknowledges what was done since the last time in the same request. */
async function receive(ack: Item[]): Promise<Delivery[]> {
  const path = `${queue}/receive`;
  const hold = { visibility_timeout_seconds: holdSeconds, consumer: "consumer-typescript" };
  const body = { ...hold, max_messages: 10, wait_seconds: 20, receive_id: randomUUID(), ack };
  let received: Received;
  try {
    received = await call<Received>("POST", path, body, stop.signal);
  } catch (error) {
    if (!stop.signal.aborted) throw error;
    // An answer may have been on its way. The same receive gives it again, and nobody has to wait until it expires.
    received = await call<Received>("POST", path, { ...body, max_messages: 1, wait_seconds: 0.001 });
  }
  if (received.ack) report(received.ack);
  return received.deliveries;
}

async function main(): Promise<void> {
  await call("PUT", queue, { stream: "main", topics: ["orders.*"], start: "earliest" }, stop.signal);
  console.log(`consuming ${queue} of ${base}`);
  let done = 0;
  let acks: Item[] = [];
  while (!stop.signal.aborted && (wanted === 0 || done < wanted)) {
    const deliveries = await receive(acks);
    acks = [];
    let begun = 0;
    await held(deliveries, async () => {
      for (const { receipt, event, attempt } of deliveries) {
        if (stop.signal.aborted) break;
        begun += 1;
        try {
          await handle(event, attempt);
          acks.push({ receipt });
        } catch (error) {
          // Comes again after the delay of the queue's retry policy; after the last attempt it is a dead letter.
          await settle("nack", [{ receipt, reason: String(error).slice(0, 200) }]);
        }
      }
    });
    done += acks.length;
    // Not begun: somebody else can have them at once, and the attempt does not count.
    await settle("release", deliveries.slice(begun).map(({ receipt }) => ({ receipt })));
  }
  await settle("ack", acks);
  console.log(`stopped after ${done} messages`);
}

main().catch((error) => {
  if (stop.signal.aborted) return console.log("stopped");
  console.error(error);
  process.exitCode = 1;
});
