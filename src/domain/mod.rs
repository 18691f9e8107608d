//! The parts of Postroad that need no database, socket or clock: names, messages, offsets, receipts, policies, and the pure
//! state machines of queues and leases. Nothing here does I/O, and time is always a parameter.

pub mod assignment;
pub mod authority;
pub mod cadence;
mod chain;
pub mod cloudevents;
pub mod database_url;
pub mod id;
pub mod json;
pub mod letter;
pub mod mapping;
pub mod message;
pub mod name;
pub mod objects;
pub mod policy;
pub mod problem;
pub mod queue;
pub mod receipt;
pub mod retention;
pub mod schedule;
mod template;
pub mod topic_index;
pub mod word;

pub use chain::chain;
