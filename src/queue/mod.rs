//! Queues: one task per queue around the pure state machine, and the writer that journals for all of them.

mod api;
mod handout;

pub use api::{
    BATCH_MAX, Declaration, Declared, Delivery, Description, Error, InFlight, InFlightFilter,
    Outcome, ReceiveRequest, Received, Status, Verb, VerbItem, WAIT_MAX,
};
pub use handout::Handout;
