-- Dead letters with their payloads, by offset: no more bytes of payload than $3 but for the first.
select l."offset", l.topic, l.appended_at, l.key, l.id, l.source, l.type, l.subject, l.event_time, l.data_content_type,
    l.data_schema, l.extensions, l.data_kind, l.data
from (
    select d."offset", sum(coalesce(octet_length(d.data), 0)) over (order by d."offset") - coalesce(octet_length(d.data), 0) as before
    from postroad_broker.dead_letter d
    where d.queue_id = $1 and d."offset" = any ($2)
) w
join postroad_broker.dead_letter l on l.queue_id = $1 and l."offset" = w."offset"
where w.before < $3
order by l."offset"
