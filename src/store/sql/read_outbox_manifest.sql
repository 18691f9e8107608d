-- The manifest of a large window: where its rows lie, after seq $3, the first $4 by seq. Pages are then read by place.
--
-- A window's rows are those that the snapshot $2 shows and the snapshot $1 does not. Read by their ids and not by the statement's own
-- snapshot, they are the same set whenever this runs: rows are inserted once, and leave only by the rotation, which takes no
-- row that the relay has not passed. This statement's own snapshot is later than $2, so it sees them all. The spans are those of
-- open_outbox_window: rows of a transaction that was in progress in $2 are not looked at, unless it was among more than 64.
with step as materialized (
    select $2::text::pg_snapshot as now, $1::text::pg_snapshot as last
),
held as materialized (
    select x as xid
    from step, pg_snapshot_xip(step.now) as x
    where x >= pg_snapshot_xmax(step.last)
    order by x
    limit 64
),
spans as materialized (
    select
        coalesce(lag(high) over (order by high), (pg_snapshot_xmax(step.last)::text::bigint - 1)::text::xid8) as low,
        high
    from step, (
        select xid as high from held
        union all
        select pg_snapshot_xmax(step.now) from step
    ) as bounds
),
stragglers as materialized (
    select x as xid
    from step, pg_snapshot_xip(step.last) as x
    where pg_visible_in_snapshot(x, step.now)
)
select seq, bucket as leaf, place::text as place, bytes
-- The text of a place is made for the rows of the chunk only, after the limit.
from (
    select seq, bucket, place, bytes
    from (
        select o.* from step, spans, lateral (
            select outbox.xid, seq, bucket, outbox.ctid as place,
                least(0::bigint + /*size*/, 2147483647)::integer as bytes from postroad.outbox where outbox.xid > spans.low and outbox.xid < spans.high and outbox.seq > $3::bigint
        ) as o
        where pg_visible_in_snapshot(o.xid, step.now)
        union all
        select outbox.xid, seq, bucket, outbox.ctid as place,
                least(0::bigint + /*size*/, 2147483647)::integer as bytes from stragglers join postroad.outbox on outbox.xid = stragglers.xid where outbox.seq > $3::bigint
    ) as found
    order by seq
    limit $4::bigint
) as chunk
order by seq
