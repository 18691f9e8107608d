-- Of queues whose place is known, those whose log does not have it: it ends before, or has another message where the queue noted
-- one. One look at the end of each log, one by the index at each noted place. A leaf that
-- is emptied meanwhile can look like that, so a hit is looked at again by a later snapshot.
with ends as (
    select h.stream_id, h.floor, greatest(h.floor, coalesce(t.last, 0)) as last
    from postroad_broker.stream_head h
    left join lateral (
        select m."offset" as last from postroad_broker.message m
        where m.stream_id = h.stream_id order by m."offset" desc limit 1
    ) t on true
    where h.stream_id = any ($2)
)
select p.queue_id, e.last
from unnest($1::bigint[], $2::integer[], $3::bigint[], $4::bigint[]) p (queue_id, stream_id, through, generation)
join ends e on e.stream_id = p.stream_id
left join postroad_broker.queue_mark k
    on k.queue_id = p.queue_id and k.generation = p.generation and k."offset" > e.floor
left join lateral (
    select m.id, m.source from postroad_broker.message m
    where m.stream_id = p.stream_id and m."offset" = k."offset" limit 1
) m on true
where p.through > e.last or (k.queue_id is not null and (m.id, m.source) is distinct from (k.id, k.source))
order by p.queue_id
