-- Dead letters with their payloads, by offset: no more bytes of payload than $3 but for the first. Each is looked up by itself: as a
-- join the planner may read all letters of the queue, payloads included.
select l."offset", l.topic, l.appended_at, l.key, l.id, l.source, l.type, l.subject, l.event_time, l.data_content_type,
    l.data_schema, l.extensions, l.data_kind, l.data
from (
    select d."offset", sum(d.bytes) over (order by d."offset") - d.bytes as before
    from unnest($2::bigint[]) p (place)
    cross join lateral (
        select s."offset", coalesce(octet_length(s.data), 0) as bytes from postroad_broker.dead_letter s
        where s.queue_id = $1 and s."offset" = p.place limit 1
    ) d
) w
cross join lateral (
    select * from postroad_broker.dead_letter s where s.queue_id = $1 and s."offset" = w."offset" limit 1
) l
where w.before < $3
order by l."offset"
