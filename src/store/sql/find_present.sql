-- Which of these (source, id) pairs the log has. The session allows hash joins only: the ids are hashed, the log read once.
select distinct w.place
from postroad_broker.message m
join unnest($1::text[], $2::text[]) with ordinality as w (source, id, place) on w.id = m.id and w.source = m.source
