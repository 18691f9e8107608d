//! The tables of `postroad demo`: a small shop that stands for any service with its own Postgres. Not part of the broker.
//! The producers' transaction here is the one that the README shows.

use sqlx::Connection as _;
use uuid::Uuid;

use super::{Connection, Error};

/// The comment of a schema that a demo made.
const MARK: &str = "made by postroad demo";

/// One order to place.
#[derive(Debug, Clone, Copy)]
pub struct NewOrder {
    /// Chosen by the producer.
    pub id: Uuid,
    /// The run of the demo; it travels in the message.
    pub run: Uuid,
    /// The product, and the ordering key of the message.
    pub product: i32,
    /// How many are ordered.
    pub quantity: i32,
    /// How the transaction ends once everything in it is written.
    pub end: End,
}

/// How a producer ends its transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The order stands.
    Commit,
    /// On purpose, as a shop does when the payment is declined: neither the order nor its message may be seen.
    RollBack,
}

/// One delivery, as a consumer recorded it.
#[derive(Debug, Clone)]
pub struct Received {
    /// The order in the message.
    pub order: Uuid,
    /// Its product.
    pub product: i32,
    /// The product's version that the producer wrote.
    pub version: i64,
    /// The delivery's number.
    pub delivery: i32,
    /// The attempt's number.
    pub attempt: i32,
    /// The message's offset.
    pub offset: i64,
}

/// The broker's answer to a verb, as a consumer read it.
#[derive(Debug, Clone)]
pub struct Settled {
    /// The order in the message.
    pub order: Uuid,
    /// The delivery that was settled.
    pub delivery: i32,
    /// The answer's word: `acked`, `nacked` …
    pub answer: String,
}

/// The committed orders beside the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamFigures {
    /// Orders in the shop's table.
    pub committed: i64,
    /// Messages of this run in the stream.
    pub in_stream: i64,
    /// Committed orders without a message in the stream.
    pub lost: i64,
    /// Messages in the stream without a committed order.
    pub phantoms: i64,
    /// Messages beyond the first of an order.
    pub duplicated: i64,
    /// Messages whose version is not the next of their product.
    pub out_of_order: i64,
}

/// The committed orders beside the records of one queue's consumers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueFigures {
    /// Orders received at least once.
    pub delivered: i64,
    /// Committed orders never received.
    pub lost: i64,
    /// Orders whose acknowledgement was answered.
    pub acknowledged: i64,
    /// Deliveries that a consumer refused, and asked for again.
    pub nacked: i64,
    /// Deliveries beyond the first of an order.
    pub redelivered: i64,
    /// Deliveries with a higher number than one whose ack was answered.
    pub redelivered_after_ack: i64,
}

/// Recreates the shop's tables, with `products` products in stock. Returns false, and changes nothing, if the database has a
/// schema `shop` that no demo made.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn create(connection: &mut Connection, products: i32) -> Result<bool, Error> {
    let comment: Option<Option<String>> = sqlx::query_scalar(
        "select obj_description(oid, 'pg_namespace') from pg_namespace where nspname = 'shop'",
    )
    .fetch_optional(&mut *connection)
    .await
    .map_err(Error::query("looking for the shop's schema"))?;
    if comment.is_some_and(|comment| comment.as_deref() != Some(MARK)) {
        return Ok(false);
    }
    sqlx::raw_sql(include_str!("sql/create_shop.sql"))
        .execute(&mut *connection)
        .await
        .map_err(Error::query("creating the shop's tables"))?;
    sqlx::query(
        "insert into shop.stock (product, quantity) select n, 1000000000 from generate_series(1, $1) n",
    )
    .bind(products)
    .execute(connection)
    .await
    .map_err(Error::query("filling the shop's stock"))?;
    Ok(true)
}

/// Places one order: the business rows and the message in one transaction. The stock row's lock comes first, which is
/// what puts the messages of a product in order. `before_commit` is called when all that is left is to send COMMIT.
///
/// # Errors
/// The database refuses or cannot be reached; the outcome of a COMMIT that failed is unknown.
pub async fn place(
    connection: &mut Connection,
    order: NewOrder,
    before_commit: impl FnOnce(),
) -> Result<(), Error> {
    let failed = || Error::query("placing an order");
    let mut transaction = connection.begin().await.map_err(failed())?;
    let version: i64 =
        sqlx::query_scalar("select version + 1 from shop.stock where product = $1 for update")
            .bind(order.product)
            .fetch_one(&mut *transaction)
            .await
            .map_err(failed())?;
    sqlx::query("update shop.stock set quantity = quantity - $2, version = $3 where product = $1")
        .bind(order.product)
        .bind(order.quantity)
        .bind(version)
        .execute(&mut *transaction)
        .await
        .map_err(failed())?;
    sqlx::query("insert into shop.orders (id, product, version, quantity) values ($1, $2, $3, $4)")
        .bind(order.id)
        .bind(order.product)
        .bind(version)
        .bind(order.quantity)
        .execute(&mut *transaction)
        .await
        .map_err(failed())?;
    let payload = serde_json::json!({
        "run": order.run,
        "order": order.id,
        "product": order.product,
        "version": version,
        "quantity": order.quantity,
    });
    sqlx::query(
        "insert into postroad.outbox (topic, key, payload) values ('shop.orders.created', $1, $2)",
    )
    .bind(format!("product-{}", order.product))
    .bind(payload.to_string())
    .execute(&mut *transaction)
    .await
    .map_err(failed())?;
    match order.end {
        End::Commit => {
            before_commit();
            transaction.commit().await.map_err(failed())
        }
        End::RollBack => transaction.rollback().await.map_err(failed()),
    }
}

/// Records what a consumer received, one row per delivery.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn insert_received(
    connection: &mut Connection,
    queue: &str,
    consumer: &str,
    received: &[Received],
) -> Result<(), Error> {
    sqlx::query(
        "insert into shop.received (queue, consumer, order_id, product, version, delivery, attempt, \"offset\") \
         select $1, $2, * from unnest($3::uuid[], $4::integer[], $5::bigint[], $6::integer[], $7::integer[], $8::bigint[])",
    )
    .bind(queue)
    .bind(consumer)
    .bind(received.iter().map(|row| row.order).collect::<Vec<_>>())
    .bind(received.iter().map(|row| row.product).collect::<Vec<_>>())
    .bind(received.iter().map(|row| row.version).collect::<Vec<_>>())
    .bind(received.iter().map(|row| row.delivery).collect::<Vec<_>>())
    .bind(received.iter().map(|row| row.attempt).collect::<Vec<_>>())
    .bind(received.iter().map(|row| row.offset).collect::<Vec<_>>())
    .execute(connection)
    .await
    .map_err(Error::query("recording what a consumer received"))?;
    Ok(())
}

/// Records what the broker answered to a consumer's verb.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn insert_settled(
    connection: &mut Connection,
    queue: &str,
    consumer: &str,
    settled: &[Settled],
) -> Result<(), Error> {
    sqlx::query(
        "insert into shop.settled (queue, consumer, order_id, delivery, answer) \
         select $1, $2, * from unnest($3::uuid[], $4::integer[], $5::text[])",
    )
    .bind(queue)
    .bind(consumer)
    .bind(settled.iter().map(|row| row.order).collect::<Vec<_>>())
    .bind(settled.iter().map(|row| row.delivery).collect::<Vec<_>>())
    .bind(
        settled
            .iter()
            .map(|row| row.answer.as_str())
            .collect::<Vec<_>>(),
    )
    .execute(connection)
    .await
    .map_err(Error::query("recording what the broker answered"))?;
    Ok(())
}

/// The last offset of a stream, 0 when it is empty.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn last_offset(connection: &mut Connection, stream: &str) -> Result<i64, Error> {
    sqlx::query_scalar(
        "select coalesce(max(message.\"offset\"), 0) from postroad_broker.message \
         join postroad_broker.stream on stream.id = message.stream_id where stream.name = $1",
    )
    .bind(stream)
    .fetch_one(connection)
    .await
    .map_err(Error::query("reading the stream's last offset"))
}

/// Compares the committed orders with the stream.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn reconcile_stream(
    connection: &mut Connection,
    run: Uuid,
    stream: &str,
    after: i64,
) -> Result<StreamFigures, Error> {
    let (committed, in_stream, lost, phantoms, duplicated, out_of_order) =
        sqlx::query_as::<_, (i64, i64, i64, i64, i64, i64)>(include_str!(
            "sql/reconcile_shop_stream.sql"
        ))
        .bind(run.to_string())
        .bind(stream)
        .bind(after)
        .fetch_one(connection)
        .await
        .map_err(Error::query("comparing the orders with the stream"))?;
    Ok(StreamFigures {
        committed,
        in_stream,
        lost,
        phantoms,
        duplicated,
        out_of_order,
    })
}

/// Compares the committed orders with what one queue's consumers recorded.
///
/// # Errors
/// The database refuses or cannot be reached.
pub async fn reconcile_queue(
    connection: &mut Connection,
    queue: &str,
) -> Result<QueueFigures, Error> {
    let (delivered, lost, acknowledged, nacked, redelivered, redelivered_after_ack) =
        sqlx::query_as::<_, (i64, i64, i64, i64, i64, i64)>(include_str!(
            "sql/reconcile_shop_queue.sql"
        ))
        .bind(queue)
        .fetch_one(connection)
        .await
        .map_err(Error::query("comparing the orders with a queue's records"))?;
    Ok(QueueFigures {
        delivered,
        lost,
        acknowledged,
        nacked,
        redelivered,
        redelivered_after_ack,
    })
}
