-- Compares the committed orders with the log. $1: the run, $2: the stream's name, $3: the stream's last offset before the run.
-- Reads tables only: the broker's counters are code under test.
with sent as (
    select
        message."offset",
        (convert_from(message.data, 'UTF8')::jsonb ->> 'order')::uuid as order_id,
        (convert_from(message.data, 'UTF8')::jsonb ->> 'product')::integer as product,
        (convert_from(message.data, 'UTF8')::jsonb ->> 'version')::bigint as version
    from postroad_broker.message
    join postroad_broker.stream on stream.id = message.stream_id
    where stream.name = $2
        and message."offset" > $3
        and message.data_kind = 1
        and convert_from(message.data, 'UTF8')::jsonb ->> 'run' = $1
),
-- Versions of a product, in stream order, must count 1, 2, 3 … without a gap or a step back.
numbered as (
    select version, row_number() over (partition by product order by "offset") as place
    from sent
)
select
    (select count(*) from shop.orders) as committed,
    (select count(*) from sent) as in_stream,
    (select count(*) from shop.orders where not exists (select from sent where sent.order_id = orders.id)) as lost,
    (select count(*) from sent where not exists (select from shop.orders where orders.id = sent.order_id)) as phantoms,
    (select count(*) - count(distinct order_id) from sent) as duplicated,
    (select count(*) from numbered where version <> place) as out_of_order
