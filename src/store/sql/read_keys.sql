-- The keys of what was appended between two offsets, by the primary key.
select m."offset", m.key
from postroad_broker.message m
where m.stream_id = $1 and m."offset" > $2 and m."offset" <= $3 and m.key is not null
order by m."offset"
