// A service that hears of orders through Postroad: it receives by long poll, does its work, acknowledges. Node 20 or later,
// no dependencies: Postroad's API is HTTP and JSON.
//
//   POSTROAD_URL    default http://127.0.0.1:8080
//   QUEUE           default mailer
//   MESSAGES        stop after so many; 0, the default, means until stopped

const base = process.env.POSTROAD_URL ?? "http://127.0.0.1:8080";
const queue = process.env.QUEUE ?? "mailer";
const wanted = Number(process.env.MESSAGES ?? 0);

const stop = new AbortController();
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => stop.abort());
const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function call(method, path, body, signal) {
  const answer = await fetch(base + path, {
    method,
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (answer.ok) return answer.json();
  const problem = await answer.text();
  throw Object.assign(new Error(`${method} ${path}: ${answer.status} ${problem}`), { status: answer.status });
}

// Network trouble, a broker that restarts, and overload pass. Anything else is a mistake of ours, and should be seen.
const passes = (error) => error.status === undefined || error.status === 429 || error.status >= 500;

async function patiently(what, signal) {
  for (let delay = 100; ; delay = Math.min(delay * 2, 5000)) {
    try {
      return await what();
    } catch (error) {
      if (signal?.aborted || !passes(error)) throw error;
      console.error(`${error.message}; trying again in ${delay} ms`);
      await pause(delay);
    }
  }
}

// Delivery is at least once: a consumer that dies between its work and its ack gets the message again. So the work must
// not do harm when it is done twice. Here a set stands for that; a service with a database inserts (source, id) into a
// table of its own, in the transaction of the work, and skips what is there already.
const handled = new Set();

async function handle(event) {
  const name = `${event.source} ${event.id}`;
  if (handled.has(name)) return;
  console.log(`mail about order ${event.data.order}: ${event.data.quantity} ${event.data.product}`);
  handled.add(name);
}

async function settle(verb, deliveries) {
  if (deliveries.length === 0) return;
  // Not aborted at shutdown, and safe to repeat: the same receipt gives the same answer.
  await patiently(() => call("POST", `/v1/queues/${queue}/${verb}`, { deliveries }));
}

async function main() {
  await patiently(
    () => call("PUT", `/v1/queues/${queue}`, { stream: "main", topics: ["orders.*"], start: "earliest" }, stop.signal),
    stop.signal,
  );
  console.log(`consuming ${queue} of ${base}`);
  let done = 0;
  while (!stop.signal.aborted && (wanted === 0 || done < wanted)) {
    const { deliveries } = await patiently(
      () => call("POST", `/v1/queues/${queue}/receive`, { max_messages: 10, wait_seconds: 20, consumer: "consumer-node" }, stop.signal),
      stop.signal,
    );
    const taken = [];
    const failed = [];
    for (const { receipt, event } of deliveries) {
      try {
        await handle(event);
        taken.push({ receipt });
      } catch (error) {
        failed.push({ receipt, reason: String(error).slice(0, 200) });
      }
    }
    await settle("ack", taken);
    // Comes again after the delay of the queue's retry policy; after the last attempt it goes to the dead letters.
    await settle("nack", failed);
    done += taken.length;
  }
  console.log(`stopped after ${done} messages`);
}

main().catch((error) => {
  if (stop.signal.aborted) return console.log("stopped");
  console.error(error.message);
  process.exitCode = 1;
});
