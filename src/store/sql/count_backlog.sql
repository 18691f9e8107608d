-- A piece of what a window holds, counted: the rows after seq $5 that the snapshot $2 shows and the snapshot $1 does not, by groups of
-- seq >> $6, each with the lowest and the highest of its transaction ids. At most $7 rows are looked at: of the ids from $3 to $4. The
-- first line, without a group, says how many that were, and between which ids.
--
-- Whose rows the window has is said by the two snapshots alone, and the ids are only where they are looked for; so it is the same set
-- whenever this runs: rows are inserted once, and leave only by the rotation, which takes no row that the relay has not passed. This
-- statement's own snapshot is later than $2, so it sees them all.
--
-- With $7 rows there may be more: of one span, those with the last id are left to the next piece, since some of them can be beyond the
-- end. The session keeps the planner from sorting, so that what is looked at is the piece, by the index, and not the span.
with piece as materialized (
    /*piece*/
),
edge as materialized (
    select count(*) as n, min(xid) as first, max(xid) as last from piece
)
select null::bigint as bucket, edge.n as count, edge.first::text::bigint as low, edge.last::text::bigint as high from edge
union all
select seq >> $6::integer, count(*), min(xid)::text::bigint, max(xid)::text::bigint
from piece, edge
where (edge.n < $7::bigint or xid < edge.last) and seq > $5::bigint
    and pg_visible_in_snapshot(xid, $2::text::pg_snapshot) and not pg_visible_in_snapshot(xid, $1::text::pg_snapshot)
group by 1
