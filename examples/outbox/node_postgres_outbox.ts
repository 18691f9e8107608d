// Publishing through the outbox with node-postgres: one insert in the transaction that is there anyway.
//
//   await client.query("begin");
//   await client.query("update stock set quantity = quantity - 1 where product = 'tea'");
//   await publish(client, "orders.created", { order: 1 }, { key: "tea" });
//   await client.query("commit");

import { randomUUID } from "node:crypto";
import pg from "pg";

type Options = { key?: string; headers?: Record<string, string | number | boolean> };

/** Update the row that the key stands for first: that keeps its messages in order. */
export async function publish(client: pg.ClientBase, topic: string, payload: unknown, options: Options = {}): Promise<string> {
  const id = randomUUID();
  await client.query(
    `insert into postroad.outbox (id, topic, key, payload, content_type, headers)
     values ($1, $2, $3, $4, 'application/json', $5::jsonb)`,
    [id, topic, options.key ?? null, JSON.stringify(payload), options.headers ? JSON.stringify(options.headers) : null],
  );
  return id;
}

const client = new pg.Client({ connectionString: process.env.DATABASE_URL });
await client.connect();
try {
  await client.query("begin");
  console.log(await publish(client, "orders.created", { from: "node-postgres" }, { key: "tea", headers: { traceparent: "00-1" } }));
  await client.query("commit");
  await client.query("begin");
  await publish(client, "orders.created", { from: "nowhere" });
  await client.query("rollback");
} finally {
  await client.end();
}
