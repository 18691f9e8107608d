-- The state from which a slot's queues recover, or one of them ($2): checkpoint, chunks and journal in one statement, so in one snapshot, after the
-- epoch was taken in a separate transaction: no former owner can write behind it. A fold in between moves rows from the journal
-- into a checkpoint; two statements could miss them. Of each queue the checkpoint first, then its chunks, among them some that it does not
-- name, then the journal in order.
select r.queue_id, r.kind, r.id, r.data
from (
    select c.queue_id, 0::smallint as kind, c.epoch, c.number, null::uuid as id, c.state as data
    from postroad_broker.queue_checkpoint c
    join postroad_broker.queue q on q.id = c.queue_id and q.generation = c.generation
    where q.slot = $1 and ($2::bigint is null or q.id = $2)
    union all
    select k.queue_id, 1::smallint, 0, 0, k.id, k.data
    from postroad_broker.queue q
    join postroad_broker.queue_checkpoint_chunk k on k.queue_id = q.id
    where q.slot = $1 and ($2::bigint is null or q.id = $2)
    union all
    select j.queue_id, 2::smallint, j.epoch, j.number, null::uuid, j.entries
    from postroad_broker.queue_journal j
    join postroad_broker.queue q on q.id = j.queue_id and q.generation = j.generation
    left join postroad_broker.queue_checkpoint c on c.queue_id = j.queue_id and c.generation = j.generation
    where j.slot = $1 and q.slot = $1 and ($2::bigint is null or q.id = $2)
      and (c.queue_id is null or (j.epoch, j.number) > (c.epoch, c.number))
) r
order by r.queue_id, r.kind, r.epoch, r.number
