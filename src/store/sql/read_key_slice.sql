-- One key's messages in leaves that are folded, so that each has its index by key. The hash finds them; the key itself tells two keys
-- of one hash apart. The columns are those of read_slice.sql.
select m."offset", m.topic_id, m.key_hash, octet_length(m.data), m.priority
from postroad_broker.message m
where m.stream_id = $1 and m.key_hash = $2 and m.key = $3 and m."offset" > $4 and m."offset" <= $5
order by m."offset"
limit $6
