//! Queues: one task per queue around the pure state machine, and the writer that journals for all of them.

mod api;
mod handle;
mod handout;
mod metrics;

pub use api::{
    BATCH_MAX, Declaration, Declared, Delivery, Description, Error, InFlight, InFlightFilter,
    Outcome, ReceiveRequest, Received, Status, Verb, VerbItem, WAIT_MAX,
};
pub use handle::Handle;
pub use handout::Handout;
