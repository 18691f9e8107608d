-- The messages between two offsets, without payloads: octet_length of a value out of line reads only its pointer.
select m."offset", m.topic_id, m.key_hash, octet_length(m.data), m.priority
from postroad_broker.message m
where m.stream_id = $1 and m."offset" > $2 and m."offset" <= $3
    and ($4::integer[] is null or m.topic_id = any ($4))
    and ($5::bigint is null or m.key_hash = $5)
    and ($7::text is null or m.id = $7)
order by m."offset"
limit $6
