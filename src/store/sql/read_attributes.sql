-- The attributes that decide order and lanes, of all messages between two offsets. As three arrays: a row each would cost more on its way than
-- it does to be found. The caller sorts.
select array_agg(m."offset"), array_agg(m.key_hash), array_agg(m.priority)
from postroad_broker.message m
where m.stream_id = $1 and m."offset" between $2 and $3
