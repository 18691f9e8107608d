-- In one statement: what the heads have belongs to the fold that is read with them. One row at least, without a key when there is
-- none. The caller sorts.
select h.keys_through, k.key, k.version, k.last_offset
from postroad_broker.stream_head h
left join lateral (
    select k.key, k.version, k.last_offset
    from postroad_broker.key_head k
    where k.stream_id = $1 and k.key > $2
    order by k.key
    limit $3
) k on true
where h.stream_id = $1
