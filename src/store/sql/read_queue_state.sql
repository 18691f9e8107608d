-- What a slot's queues recover from: checkpoint and journal in one statement, so in one snapshot, after the epoch was
-- taken in a transaction of its own: no former owner can write behind it. A fold in between moves rows from the journal
-- into a checkpoint; two statements could miss them.
select r.queue_id, r.is_journal, r.data
from (
    select c.queue_id, false as is_journal, c.epoch, c.number, c.state as data
    from postroad_broker.queue_checkpoint c
    join postroad_broker.queue q on q.id = c.queue_id and q.generation = c.generation
    where q.slot = $1
    union all
    select j.queue_id, true, j.epoch, j.number, j.entries
    from postroad_broker.queue_journal j
    join postroad_broker.queue q on q.id = j.queue_id and q.generation = j.generation
    left join postroad_broker.queue_checkpoint c on c.queue_id = j.queue_id and c.generation = j.generation
    where j.slot = $1 and q.slot = $1
      and (c.queue_id is null or (j.epoch, j.number) > (c.epoch, c.number))
) r
order by r.queue_id, r.epoch, r.number, r.is_journal
