-- In one statement: what a head has belongs to the fold that is read with it.
select h.keys_through, k.version, k.last_offset
from postroad_broker.stream_head h
left join postroad_broker.key_head k on k.stream_id = h.stream_id and k.stream_id = $1 and k.key = $2
where h.stream_id = $1
