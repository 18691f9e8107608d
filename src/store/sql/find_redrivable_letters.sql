-- The next dead letters of a redrive, by offset: those of its selection that died when it began at the latest and are not on
-- their way back already. Looks at $6 rows at most; `through` and `is_end` as in list_letters.sql.
with examined as materialized (
    select d."offset", d.delivery, d.key,
        d.redriven_at is null and d.died_at <= $5 and postroad_broker.dead_letter_fits(d, $4::text::jsonb) as fits
    from postroad_broker.dead_letter d
    where d.queue_id = $1 and d."offset" > $2 and ($3::bigint[] is null or d."offset" = any ($3))
    order by d."offset" limit $6
),
page as (
    select e."offset", e.delivery, e.key from examined e where e.fits order by e."offset" limit $7
)
select x.through, x.is_end, p."offset", p.delivery, p.key
from (select max(e."offset") as through, count(*) < $6 as is_end from examined e) x
left join page p on true
order by p."offset"
