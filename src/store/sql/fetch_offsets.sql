-- Single messages, by the primary key. The caller sorts: an index condition on an array has no order.
select m."offset", m.topic_id, m.appended_at, m.key, m.id, m.source, m.type, m.subject, m.event_time, m.data_content_type,
    m.data_schema, m.extensions, m.data_kind, m.data
from postroad_broker.message m
where m.stream_id = $1 and m."offset" = any ($2)
