//! Deliveries: receive, the verbs, and the list of live deliveries.

mod in_flight;
mod receive;
mod verbs;

pub(in crate::http) use receive::Receive;

use utoipa_axum::router::OpenApiRouter;

use crate::http::state::State;

pub(super) fn routes() -> OpenApiRouter<State> {
    OpenApiRouter::new()
        .merge(receive::routes())
        .merge(verbs::routes())
        .merge(in_flight::routes())
}
