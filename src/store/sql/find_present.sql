-- Which of these (source, id) pairs the log has, or waits to have: what is scheduled is not in the log yet. The session allows hash
-- joins only: the ids are hashed, the log read once.
select distinct w.place
from (
    select m.source, m.id from postroad_broker.message m
    union all
    select s.source, s.id from postroad_broker.scheduled_message s
) m
join unnest($1::text[], $2::text[]) with ordinality as w (source, id, place) on w.id = m.id and w.source = m.source
