-- Scheduled messages that wait, after a place in the order (due, number). Both pairs are conditions of the leaves' indexes.
select m.stream_id, m.due_at, m.number, m.topic_id, m.key, m.id, m.source, m.type, m.priority, m.accepted_at, m.bytes
from postroad_broker.scheduled_stream s
cross join lateral postroad_broker.scheduled_horizon(s.stream_id) h
cross join lateral (
    select l.stream_id, l.due_at, l.number, l.topic_id, l.key, l.id, l.source, l.type, l.priority, l.accepted_at,
        coalesce(octet_length(l.data), 0) as bytes
    from postroad_broker.scheduled_message l
    where l.stream_id = s.stream_id and l.due_at >= $1 and l.due_at < $2 and (l.due_at, l.number) > ($3, $4)
        and (l.due_at, l.number) > (h.due_at, h.number) and l.cancelled_at is null
    order by l.due_at, l.number
    limit $6
) m
where $5::integer is null or s.stream_id = $5
order by m.due_at, m.number
limit $6
