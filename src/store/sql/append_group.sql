-- The whole append is one call that commits by itself: see the function's header in migrations/broker.
select status, clock, stream_first, stream_at, refused_member, refused_found, seen_message, seen_offset, seen_conflict,
    conflict_message, conflict_version, seen_due, scheduled_number
from postroad_broker.append(
    $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22,
    $23, $24, $25, $26, $27, $28, $29, $30, $31, $32, $33, $34, $35, $36, $37, $38, $39, $40, $41, $42, $43,
    $44, $45, $46, $47, $48, $49, $50, $51
)
