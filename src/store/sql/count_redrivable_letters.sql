-- As find_redrivable_letters.sql, but counts those that fit among the $6 next.
select max(e."offset"), count(*) < $6, count(*) filter (where e.fits)
from (
    select d."offset",
        d.redriven_at is null and d.died_at <= $5 and postroad_broker.dead_letter_fits(d, $4::text::jsonb) as fits
    from postroad_broker.dead_letter d
    where d.queue_id = $1 and d."offset" > $2 and ($3::bigint[] is null or d."offset" = any ($3))
    order by d."offset" limit $6
) e
