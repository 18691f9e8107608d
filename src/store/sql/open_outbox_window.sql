-- Opens a relay's window: what became visible between the snapshot $1 and now. One row at least, in any order;
-- the first by `n` carries the identity and the new snapshot, and each row with a seq is an outbox row. $2 is the position's mark
-- (null: none to look for), $3 the most rows, $4 the most bytes of rows returned. With more than $3 rows, or a null
-- `is_whole`, the window is large.
--
-- Why it is safe:
--  * It is one statement at read committed, so pg_current_snapshot() is the snapshot that everything here is read by: the rows,
--    the mark, and the identity belong together. Every row that a later snapshot shows and this one does not has a transaction id
--    that is either at or beyond this snapshot's xmax or in its list of transactions in progress, which is exactly what the
--    next window asks for.
--  * A row's xid is its top-level transaction's, also under savepoints, and the snapshot's list has top-level ids. So a row is seen
--    by a snapshot exactly when its id is; pg_visible_in_snapshot is asked nevertheless, so that the window is the same set of
--    rows when it is read again later by its two snapshots.
--  * The range is cut into spans around the ids that are in progress, the oldest 64 of them: a million rows of an open
--    transaction are not even looked at. `stragglers` were in progress in $1 and have ended; those known to be aborted are left out
--    for the same reason. Each is a span of its own, below those of the new ids, so that the leaves are opened once for all of them.
--
-- Its plan is kept, since making it takes five times as long as an ordinary window does. It is the same for leaves of any size:
-- `offset 0` leaves the planner no way to the rows but their index, with the ids of a span at hand.
--
-- Rows are wide, and each node of the plan that keeps them copies them: one sort and one window for both sums, no CTE of its own and no
-- sort at the end made 1.0 ms of 1.6 for 400 rows.
with step as materialized (
    select pg_current_snapshot() as now, $1::text::pg_snapshot as last
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
        -- Both ends are left out: each is an id in progress, the id before the first, or the new snapshot's xmax.
        coalesce(lag(high) over (order by high), (pg_snapshot_xmax(step.last)::text::bigint - 1)::text::xid8) as low,
        high
    from step, (
        select xid as high from held
        union all
        select pg_snapshot_xmax(step.now) from step
    ) as bounds
    union all
    -- The stragglers.
    select (x::text::bigint - 1)::text::xid8, (x::text::bigint + 1)::text::xid8
    from step, pg_snapshot_xip(step.last) as x
    where case when pg_visible_in_snapshot(x, step.now) then pg_xact_status(x) is distinct from 'aborted' else false end
),
found as not materialized (
    select o.*
    from step, spans, lateral (
        select * from postroad.outbox where outbox.xid > spans.low and outbox.xid < spans.high offset 0
    ) as o
    where pg_visible_in_snapshot(o.xid, step.now)
    -- With none asked for no row is looked at, so that one that cannot be printed is in nobody's way.
    limit case when $3::bigint > 0 then $3::bigint + 1 else 0 end
),
numbered as (
    select
        found.*,
        count(*) over (order by found.seq rows unbounded preceding) as n,
        sum(/*size*/) over (order by found.seq rows unbounded preceding)
            <= $4::bigint as is_whole
    from found
),
identity as materialized (
    select
        pg_is_in_recovery() as in_recovery,
        (select system_identifier from pg_control_system())::text as system_identifier,
        case when pg_is_in_recovery() then 0
            else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer end as timeline,
        pg_backend_pid() as backend_pid,
        $2::uuid is null or exists (select from postroad.relay_mark where id = $2::uuid) as has_mark,
        pg_snapshot_xmax(step.last) > pg_snapshot_xmax(step.now) as is_ahead,
        step.now::text as snapshot,
        clock_timestamp() as read_at
    from step
)
select
    case when coalesce(r.n, 1) = 1 then i.in_recovery end as in_recovery,
    case when coalesce(r.n, 1) = 1 then i.system_identifier end as system_identifier,
    case when coalesce(r.n, 1) = 1 then i.timeline end as timeline,
    case when coalesce(r.n, 1) = 1 then i.backend_pid end as backend_pid,
    case when coalesce(r.n, 1) = 1 then i.has_mark end as has_mark,
    case when coalesce(r.n, 1) = 1 then i.is_ahead end as is_ahead,
    case when coalesce(r.n, 1) = 1 then i.snapshot end as snapshot,
    case when coalesce(r.n, 1) = 1 then i.read_at end as read_at,
    r.n, r.seq, r.is_whole, r.topic,
    case when r.is_whole then r.payload end as payload,
    case when r.is_whole then r.payload_bytes end as payload_bytes,
    r.key, r.type, r.id, r.source, r.subject, r.content_type, r.data_schema, r.headers::text as headers,
    r.expected_version,
    case when r.time >= '0001-01-01 00:00:00+00' and r.time < '10000-01-01 00:00:00+00' then r.time end as time,
    coalesce(r.time >= '0001-01-01 00:00:00+00' and r.time < '10000-01-01 00:00:00+00', true) as time_is_valid,
    case when r.deliver_at >= '0001-01-01 00:00:00+00' and r.deliver_at < '10000-01-01 00:00:00+00'
        then r.deliver_at end as deliver_at,
    coalesce(r.deliver_at >= '0001-01-01 00:00:00+00' and r.deliver_at < '10000-01-01 00:00:00+00', true) as deliver_at_is_valid
from identity as i
left join numbered as r on true
