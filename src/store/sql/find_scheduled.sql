-- One scheduled message, in the columns of a row of the log, and what became of it.
select 0::bigint, m.topic_id, m.accepted_at, m.key, m.id, m.source, m.type, m.subject, m.event_time, m.data_content_type,
    m.data_schema, m.extensions, m.data_kind, m.data, m.cancelled_at, (m.due_at, m.number) <= (h.due_at, h.number),
    case when m.cancelled_at is null and (m.due_at, m.number) <= (h.due_at, h.number)
        then postroad_broker.scheduled_offset(m.stream_id, m.due_at, m.number) end
from postroad_broker.scheduled_message m
cross join lateral postroad_broker.scheduled_horizon(m.stream_id) h
where m.stream_id = $1 and m.due_at = $2 and m.number = $3
    and exists (select from postroad_broker.scheduled_stream s where s.stream_id = m.stream_id)
    and ((m.due_at, m.number) > (h.due_at, h.number) or m.due_at >= postroad_broker.scheduled_remembered())
