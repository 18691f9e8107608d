//! Deliveries: receive, the verbs, and the list of live deliveries.

mod in_flight;
mod receive;
mod verbs;

pub(in crate::http) use receive::Receive;

use crate::http::route::Routes;

pub(super) fn routes() -> Routes {
    Routes::new()
        .merge(receive::routes())
        .merge(verbs::routes())
        .merge(in_flight::routes())
}
