-- A page of a queue's dead letters, by offset. Looks at $5 rows at most, so that a selection that fits few of many takes
-- several short pages instead of one long statement: `through` says how far it looked, `is_end` that there is no more. The
-- letters of the page are looked up one by one: in a separate join the planner would read all letters there are into a hash.
with examined as materialized (
    select d."offset", postroad_broker.dead_letter_fits(d, $4::text::jsonb) as fits
    from postroad_broker.dead_letter d
    where d.queue_id = $1 and d."offset" > $2 and ($3::bigint[] is null or d."offset" = any ($3))
    order by d."offset" limit $5
),
page as (
    select e."offset" from examined e where e.fits order by e."offset" limit $6
)
select x.through, x.is_end, d.generation, d."offset", d.delivery, d.attempts, d.cause, d.failures -> -1 ->> 'reason' as reason,
    d.died_at, d.topic, d.key, d.id, d.source, coalesce(d.type, d.topic) as type, d.redrive_id, d.redriven_at,
    d.forward_topic, d.forwarded_at
from (select max(e."offset") as through, count(*) < $5 as is_end from examined e) x
left join (
    page p
    cross join lateral (
        select l.generation, l."offset", l.delivery, l.attempts, l.cause, l.failures, l.died_at, l.topic, l.key, l.id, l.source,
            l.type, l.redrive_id, l.redriven_at, l.forward_topic, l.forwarded_at
        from postroad_broker.dead_letter l
        where l.queue_id = $1 and l."offset" = p."offset" limit 1
    ) d
) on true
order by d."offset"
