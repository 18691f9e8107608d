//! Words that engines and the domain know, in answers. Each is printed and described from the one list that its enum has.

use std::borrow::Cow;

use serde::Serialize;
use utoipa::openapi::{ObjectBuilder, RefOr, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

use crate::domain::letter;
use crate::domain::mapping;
use crate::domain::queue;
use crate::domain::schedule;
use crate::relay;

macro_rules! described {
    ($($(#[$doc:meta])* $name:ident($words:ty);)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
        #[serde(transparent)]
        pub(in crate::http) struct $name(pub(in crate::http) $words);

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let words = <$words>::ALL.iter().map(|word| word.as_str());
                let schema = ObjectBuilder::new().schema_type(Type::String);
                schema.enum_values(Some(words)).into()
            }
        }

        impl ToSchema for $name {
            fn name() -> Cow<'static, str> {
                Cow::Borrowed(stringify!($name))
            }
        }
    )*};
}

described! {
    /// The reason why a receive got nothing.
    EmptyReason(queue::EmptyReason);
    /// The cause of a death.
    DeathCause(letter::Cause);
    /// A redrive's status.
    RedriveStatus(letter::RedriveStatus);
    /// The policy for missed occurrences.
    Misfire(schedule::Misfire);
    /// A way to pick up a table's rows.
    Pickup(mapping::Pickup);
    /// A relay's state.
    RelayState(relay::State);
}
