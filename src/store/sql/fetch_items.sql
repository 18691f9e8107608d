-- The columns of read_slice.sql, of single messages, each place looked up by itself: see fetch_attributes.sql. The caller sorts.
select m."offset", m.topic_id, m.key_hash, m.data_bytes, m.priority
from unnest($2::bigint[]) w (place)
cross join lateral (
    select m."offset", m.topic_id, m.key_hash, octet_length(m.data) as data_bytes, m.priority
    from postroad_broker.message m
    where m.stream_id = $1 and m."offset" = w.place and m."offset" between $3 and $4
    limit 1
) m
