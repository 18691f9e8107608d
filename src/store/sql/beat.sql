-- A heartbeat, and what this node then knows of all: one statement, so one snapshot. It is older than the renewal; that this
-- node lives is what the renewal says. Plain reads: nobody is waited for but whoever judges this very row.
with renewed as (
    update postroad_broker.node n
    set expires_at = clock_timestamp() + make_interval(secs => $2), wants = $3, is_leaving = $4,
        -- One that was given up may come later than its successor.
        beat = greatest(n.beat, $5)
    where n.incarnation = $1 and n.dead_at is null
    returning n.incarnation
)
select
    exists (select from renewed),
    clock_timestamp(),
    (select c.version from postroad_broker.queue_catalogue c),
    n.incarnations, n.addresses, n.urls, n.started_ats, n.expires_ats, n.ttls, n.wants, n.are_leaving,
    l.names, l.epochs, l.holders, l.acquired_ats,
    a.names, a.nodes,
    n.loads
from (
    select
        coalesce(array_agg(n.incarnation order by n.incarnation), '{}') as incarnations,
        coalesce(array_agg(n.address order by n.incarnation), '{}') as addresses,
        coalesce(array_agg(n.url order by n.incarnation), '{}') as urls,
        coalesce(array_agg(n.started_at order by n.incarnation), '{}') as started_ats,
        coalesce(array_agg(n.expires_at order by n.incarnation), '{}') as expires_ats,
        coalesce(array_agg(n.ttl_seconds order by n.incarnation), '{}') as ttls,
        coalesce(array_agg(array_to_string(n.wants, ' ') order by n.incarnation), '{}') as wants,
        coalesce(array_agg(n.is_leaving order by n.incarnation), '{}') as are_leaving,
        coalesce(array_agg(array_to_string(n.slot_loads, ' ') order by n.incarnation), '{}') as loads
    from postroad_broker.node n
    where n.dead_at is null
) n,
(
    select
        coalesce(array_agg(l.name order by l.name), '{}') as names,
        coalesce(array_agg(l.epoch order by l.name), '{}') as epochs,
        coalesce(array_agg(l.holder order by l.name), '{}') as holders,
        coalesce(array_agg(l.acquired_at order by l.name), '{}') as acquired_ats
    from postroad_broker.lease l
) l,
(
    select
        coalesce(array_agg(a.name order by a.name), '{}') as names,
        coalesce(array_agg(a.node order by a.name), '{}') as nodes
    from postroad_broker.assignment a
) a
