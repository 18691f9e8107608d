//! The routes, one file per family.

mod cluster;
mod dead_letters;
mod deliveries;
mod docs;
mod keys;
mod locks;
mod origins;
mod publish;
mod queue_messages;
pub(in crate::http) mod queues;
mod redrives;
mod renewals;
mod replay;
mod retry;
mod scheduled_messages;
mod schedules;
pub(in crate::http) mod streams;
pub(in crate::http) mod system;
pub(in crate::http) mod topics;
pub(in crate::http) mod wire;
mod words;

use super::route::Routes;

pub(in crate::http) use deliveries::Receive;
#[cfg(test)]
pub(in crate::http) use replay::LoggedMessage;

/// Adds all routes.
pub(in crate::http) fn all(routes: Routes) -> Routes {
    routes
        .merge(publish::routes())
        .merge(topics::routes())
        .merge(streams::routes())
        .merge(replay::routes())
        .merge(keys::routes())
        .merge(queues::routes())
        .merge(renewals::routes())
        .merge(queue_messages::routes())
        .merge(deliveries::routes())
        .merge(dead_letters::routes())
        .merge(redrives::routes())
        .merge(locks::routes())
        .merge(origins::routes())
        .merge(cluster::routes())
        .merge(scheduled_messages::routes())
        .merge(schedules::routes())
        .merge(docs::routes())
        .merge(system::routes())
}
