-- Single messages, by the primary key, each place looked up by itself: see fetch_attributes.sql. The caller sorts.
select m.*
from unnest($2::bigint[]) w (place)
cross join lateral (
    select m."offset", m.topic_id, m.appended_at, m.key, m.id, m.source, m.type, m.subject, m.event_time,
        m.data_content_type, m.data_schema, m.extensions, m.data_kind, m.data
    from postroad_broker.message m
    where m.stream_id = $1 and m."offset" = w.place and m."offset" between $3 and $4
    limit 1
) m
