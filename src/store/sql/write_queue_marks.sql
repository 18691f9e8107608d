-- Notes which message stands where a queue has settled everything up to. It is true whoever writes it and whenever: a message
-- never changes its place. The place of one that is gone stays as it was noted before.
insert into postroad_broker.queue_mark as k (queue_id, generation, "offset", source, id)
select p.queue_id, p.generation, p."offset", m.source, m.id
from unnest($1::bigint[], $2::bigint[], $3::bigint[]) p (queue_id, generation, "offset")
join postroad_broker.queue q on q.id = p.queue_id and q.generation = p.generation
cross join lateral postroad_broker.messages_at(q.stream_id, array[p."offset"]) m
order by p.queue_id
on conflict (queue_id) do update
    set generation = excluded.generation, "offset" = excluded."offset", source = excluded.source, id = excluded.id
    where (k.generation, k."offset") < (excluded.generation, excluded."offset")
