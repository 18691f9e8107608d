-- Compares the committed orders with what the consumers of one queue recorded. $1: the queue.
with received as (
    select order_id, delivery, attempt from shop.received where queue = $1
),
settled as (
    select order_id, delivery, answer from shop.settled where queue = $1
)
select
    (select count(distinct order_id) from received) as delivered,
    (select count(*) from shop.orders where not exists (select from received where received.order_id = orders.id)) as lost,
    (select count(distinct order_id) from settled where answer in ('acked', 'already_settled')) as acknowledged,
    -- Asked for by the consumer: one more delivery for each refusal.
    (select count(*) from settled where answer = 'nacked') as nacked,
    (select count(*) - count(distinct order_id) from received) as redelivered,
    -- Judged by delivery numbers: an answer can be late on the wire.
    (
        select count(*)
        from received
        join (
            select order_id, min(delivery) as delivery
            from settled
            where answer = 'acked'
            group by order_id
        ) as acked using (order_id)
        where received.delivery > acked.delivery
    ) as redelivered_after_ack
