-- The next rows of a mapped table that is picked up by deletion: the first $2 in order, up to $3 bytes, but always
-- one. $1 is the position's mark (null: none to look for). One row at least; the first carries the origin's identity.
--
-- One statement at read committed: the rows, the mark and the identity are of one snapshot. Nothing here says which rows are new:
-- whatever is in the table and committed is, since what was relayed leaves before the next batch is read.
with found as materialized (
    select * from postroad.outbox where /*kept*/ order by /*order*/
    limit case when $2::bigint > 0 then $2::bigint + 1 else 0 end
),
numbered as (
    select found.*, row_number() over by_order as n, sum(size) over (by_order rows unbounded preceding) as running_size
    from found
    window by_order as (order by /*order*/)
),
identity as materialized (
    select
        pg_is_in_recovery() as in_recovery,
        (select system_identifier from pg_control_system())::text as system_identifier,
        case when pg_is_in_recovery() then 0
            else ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer end as timeline,
        pg_backend_pid() as backend_pid,
        $1::uuid is null or exists (select from postroad.relay_mark where id = $1::uuid) as has_mark,
        false as is_ahead,
        pg_current_snapshot()::text as snapshot,
        clock_timestamp() as read_at,
        (select count(*) from found) as found_count
)
select
    i.in_recovery, i.system_identifier, i.timeline, i.backend_pid, i.has_mark, i.is_ahead, i.snapshot, i.read_at, i.found_count,
    r.n, r.keys, r.seq, r.topic, r.payload, r.payload_bytes, r.key, r.type, r.id, r.source, r.subject, r.content_type,
    r.data_schema, r.headers::text as headers, r.expected_version,
    case when r.time >= '0001-01-01 00:00:00+00' and r.time < '10000-01-01 00:00:00+00' then r.time end as time,
    coalesce(r.time >= '0001-01-01 00:00:00+00' and r.time < '10000-01-01 00:00:00+00', true) as time_is_valid,
    case when r.deliver_at >= '0001-01-01 00:00:00+00' and r.deliver_at < '10000-01-01 00:00:00+00' then r.deliver_at end as deliver_at,
    coalesce(r.deliver_at >= '0001-01-01 00:00:00+00' and r.deliver_at < '10000-01-01 00:00:00+00', true) as deliver_at_is_valid
from identity as i
left join numbered as r on r.n <= $2::bigint and (r.running_size <= $3::bigint or r.n = 1)
order by r.n
