-- The places of a window's rows: those with seqs from $3 to $4 that the snapshot $2 shows and the snapshot $1 does not, the first $5 by
-- seq, as far as they are found where a count of the window (count_backlog) has seen some. Pages are then read by place.
select seq, leaf, place::text as place, bytes
-- The text of a place is made after the limit.
from (
    select o.seq, o.leaf, o.place, o.bytes
    from /*found*/ as o
    where pg_visible_in_snapshot(o.xid, $2::text::pg_snapshot) and not pg_visible_in_snapshot(o.xid, $1::text::pg_snapshot)
    order by o.seq
    limit $5::bigint
) as chunk
order by seq
