-- Of queues whose place is known, those whose log does not have it: it ends before, or has another message where the queue noted
-- one. One look at the end of each log, one at each noted place, each in its leaf by its name. A leaf that
-- is emptied meanwhile can look like that, so a hit is looked at again by a later snapshot. Fails with lock_not_available when somebody
-- has locked one of the leaves.
with ends as materialized (
    select h.stream_id, h.floor, greatest(h.floor, coalesce(postroad_broker.log_end(h.stream_id), 0)) as last
    from postroad_broker.stream_head h
    where h.stream_id = any ($2)
)
select p.queue_id, e.last
from unnest($1::bigint[], $2::integer[], $3::bigint[], $4::bigint[]) p (queue_id, stream_id, through, generation)
join ends e on e.stream_id = p.stream_id
left join postroad_broker.queue_mark k
    on k.queue_id = p.queue_id and k.generation = p.generation and k."offset" > e.floor
left join lateral postroad_broker.messages_at(p.stream_id, array[k."offset"]) m on k.queue_id is not null
where p.through > e.last or (k.queue_id is not null and (m.id, m.source) is distinct from (k.id, k.source))
order by p.queue_id
