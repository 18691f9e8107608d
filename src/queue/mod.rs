//! Queues: one task per queue around the pure state machine, and the writer that journals for all of them.
