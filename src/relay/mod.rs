//! Relays: one task per origin, from committed outbox rows into streams, exactly once and in order.
