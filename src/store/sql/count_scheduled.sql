-- How many scheduled messages of each stream wait. Bounded, and over the index alone but for those that were cancelled.
select s.stream_id, t.name, (
    select count(*) from (
        select from postroad_broker.scheduled_message m
        where m.stream_id = s.stream_id and m.due_at >= h.due_at and (m.due_at, m.number) > (h.due_at, h.number)
            and m.cancelled_at is null
        limit 1000000
    ) w
)
from postroad_broker.scheduled_stream s
join postroad_broker.stream t on t.id = s.stream_id
cross join lateral postroad_broker.scheduled_horizon(s.stream_id) h
order by s.stream_id
