-- Dead letters whose copies have yet to be published, of these queues: $2 at most, and no more bytes of payload than $3 but
-- for the first. Each is looked up by itself, as in fetch_letters.sql.
select l.queue_id, l.generation, l.delivery, l.attempts, l.cause, l.failures::text as failures, l.died_at, l.forward_topic,
    l."offset", l.topic, l.appended_at, l.key, l.id, l.source, l.type, l.subject, l.event_time, l.data_content_type,
    l.data_schema, l.extensions, l.data_kind, l.data
from (
    select d.queue_id, d."offset",
        sum(coalesce(octet_length(d.data), 0)) over (order by d.queue_id, d."offset") - coalesce(octet_length(d.data), 0) as before
    from (
        select d.queue_id, d."offset", d.data
        from postroad_broker.dead_letter d
        where d.forward_topic is not null and d.forwarded_at is null and d.queue_id = any ($1)
        order by d.queue_id, d."offset" limit $2
    ) d
) w
cross join lateral (
    select * from postroad_broker.dead_letter s where s.queue_id = w.queue_id and s."offset" = w."offset" limit 1
) l
where w.before < $3
order by l.queue_id, l."offset"
