-- The attributes that decide order and lanes, of single messages, by the primary key, each place looked up by itself: the leaves have no
-- statistics, and the planner takes `stream_id = $1` to say so much that an array of places would only filter a walk over the
-- whole leaf; the limit keeps it from turning the look-ups into a join of the other order. The bounds leave out the leaves
-- that none of the places is in. The caller sorts.
select m."offset", m.key_hash, m.priority
from unnest($2::bigint[]) w (place)
cross join lateral (
    select m."offset", m.key_hash, m.priority
    from postroad_broker.message m
    where m.stream_id = $1 and m."offset" = w.place and m."offset" between $3 and $4
    limit 1
) m
