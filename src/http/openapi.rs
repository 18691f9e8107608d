//! The description of the API, made from the routes themselves.

use std::collections::BTreeMap;

use utoipa::IntoResponses;
use utoipa::openapi::security::SecurityRequirement;
use utoipa::openapi::server::Server;
use utoipa::openapi::{ContentBuilder, OpenApi, Ref, RefOr, Response, ResponseBuilder};

use super::problem::{Document, Kind};
use super::route::operations;

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Postroad",
        description = "A transactional outbox message broker for Postgres. Every error is a problem document \
                       (RFC 9457); its `type` is the path of a page that explains it.",
    ),
    components(schemas(Document)),
    tags(
        (name = "publish", description = "Publishing messages to streams"),
        (name = "topics", description = "Rules for publishing: schemas, sizes, rates"),
        (name = "streams", description = "Ordered, replayable logs"),
        (name = "queues", description = "Durable consumers of streams"),
        (name = "deliveries", description = "Receiving and settling messages"),
        (name = "dead letters", description = "Messages that were rejected or ran out of attempts, and redriving them"),
        (name = "scheduled messages", description = "Messages that enter their stream later, once or on a schedule"),
        (name = "locks", description = "Named leases with fencing tokens, for work that only one process may do at a time"),
        (name = "origins", description = "Databases with an outbox"),
        (name = "operation", description = "Health, metrics and this description"),
    ),
)]
struct Base;

macro_rules! problem_sets {
    ($($(#[$doc:meta])* $name:ident = $($kind:ident)*;)*) => {$(
        $(#[$doc])*
        pub(in crate::http) struct $name;

        impl IntoResponses for $name {
            fn responses() -> BTreeMap<String, RefOr<Response>> {
                document(&[$(Kind::$kind),*])
            }
        }
    )*};
}

problem_sets! {
    /// Of every route.
    Fails = Internal;
    /// Of routes with names or parameters.
    Reads = MalformedRequest InvalidRequest Internal Unavailable Stopping;
    /// Of routes with a JSON body.
    Writes = MalformedRequest RequestTimeout PayloadTooLarge UnsupportedMediaType InvalidRequest Internal
        OutcomeUnknown Unavailable NoOwner Stopping;
    /// Of publishing.
    Publishes = MalformedRequest RequestTimeout IdConflict VersionConflict StreamNotKeyed PayloadTooLarge MessageTooLarge UnsupportedMediaType
        InvalidRequest InvalidMessage SchemaMismatch RateLimited TooManyTopics TooManyRequests Internal OutcomeUnknown Unavailable Stopping;
    /// No settings for the topics.
    NoTopicSettings = TopicSettingsNotFound;
    /// Bounds of the settings of topics.
    TopicSettingsBounds = TooManyTopicSettings;
    /// A lock that nobody holds or held lately.
    NoLock = LockNotFound;
    /// Conflicts of acquiring and renewing a lock.
    LockConflicts = LockHeld LockLost TooManyRequests;
    /// No such stream.
    NoStream = StreamNotFound;
    /// No such queue.
    NoQueue = QueueNotFound LogBehindQueue;
    /// No such queue, or message of it.
    NoMessage = QueueNotFound QueueMessageNotFound LogBehindQueue;
    /// Conflicts of beginning a generation.
    QueueMoved = GenerationMoved LogBehindQueue;
    /// Conflicts of declaring a stream.
    StreamConflicts = StreamOverlap StreamKeyedFixed TooManyStreams;
    /// Of the routes of keys.
    NotKeyed = StreamNotKeyed;
    /// Of a replay that asks for what is gone.
    OffsetsLost = OffsetGone;
    /// Bounds of following a stream.
    TooManyReaders = TooManyRequests;
    /// Conflicts of deleting a stream.
    StreamStays = StreamHasQueues StreamHasScheduled StreamIsKept;
    /// Conflicts of declaring a queue.
    QueueConflicts = QueueStreamFixed TooManyQueues LogBehindQueue;
    /// No such queue or dead letter.
    NoLetter = QueueNotFound DeadLetterNotFound;
    /// No such queue or redrive.
    NoRedrive = QueueNotFound RedriveNotFound;
    /// Of removing a dead letter.
    LetterStays = DeadLetterRedriven OutcomeUnknown NoOwner;
    /// Of cancelling a redrive.
    Cancels = OutcomeUnknown NoOwner;
    /// Bounds of a queue.
    QueueBounds = TooManyRequests;
    /// No such origin.
    NoOrigin = OriginNotFound;
    /// No such origin or rejected row.
    NoRejected = OriginNotFound RejectedMessageNotFound;
    /// Of sending a rejected row on.
    Resends = MalformedRequest RequestTimeout IdConflict NotResendable PayloadTooLarge UnsupportedMediaType
        InvalidRequest InvalidMessage TooManyRequests Internal OutcomeUnknown Unavailable Stopping;
    /// No such scheduled message.
    NoScheduled = ScheduledMessageNotFound;
    /// Of cancelling a scheduled message.
    CancelsScheduled = AlreadyPublished OutcomeUnknown;
    /// No such schedule.
    NoSchedule = ScheduleNotFound;
    /// Bounds of schedules.
    SchedulesFull = TooManySchedules;
    /// No such path.
    NoPage = NotFound;
}

/// The responses of some kinds of problem, one per status.
fn document(kinds: &[Kind]) -> BTreeMap<String, RefOr<Response>> {
    let mut titles: BTreeMap<u16, Vec<&str>> = BTreeMap::new();
    for kind in kinds {
        titles.entry(kind.status()).or_default().push(kind.title());
    }
    titles
        .into_iter()
        .map(|(status, titles)| {
            let content = ContentBuilder::new()
                .schema(Some(Ref::from_schema_name("Problem")))
                .build();
            let response = ResponseBuilder::new()
                .description(titles.join(". Or: "))
                .content("application/problem+json", content)
                .build();
            (status.to_string(), RefOr::T(response))
        })
        .collect()
}

/// The description before any route is in it.
pub(in crate::http) fn begin() -> OpenApi {
    <Base as utoipa::OpenApi>::openapi()
}

/// Adds what holds for all routes.
pub(in crate::http) fn finish(description: &mut OpenApi) {
    // Generated clients start from the broker that they got it from, and there is no sign-in.
    description.servers = Some(vec![Server::new("/")]);
    description.security = Some(vec![SecurityRequirement::default()]);
    let everywhere = document(EVERYWHERE);
    for item in description.paths.paths.values_mut() {
        for (_, operation) in operations(item) {
            for (status, response) in &everywhere {
                let responses = &mut operation.responses.responses;
                responses
                    .entry(status.clone())
                    .or_insert_with(|| response.clone());
            }
        }
    }
}

/// What the layers around all routes answer.
const EVERYWHERE: &[Kind] = &[
    Kind::MalformedRequest,
    Kind::CrossSite,
    Kind::HostNotAllowed,
    Kind::Internal,
    Kind::Overloaded,
];

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::collections::{BTreeSet, HashSet};

    use serde_json::Value;

    use super::*;

    fn description() -> Value {
        serde_json::to_value(crate::http::api().router.into_openapi()).unwrap()
    }

    /// Every operation with its path and method.
    fn each(description: &Value) -> Vec<(String, &Value)> {
        let paths = description["paths"].as_object().unwrap().iter();
        paths
            .flat_map(|(path, item)| {
                let methods = item.as_object().unwrap().iter();
                methods.map(move |(method, operation)| (format!("{method} {path}"), operation))
            })
            .collect()
    }

    /// Generators make a function of each, and many a type.
    #[test]
    fn every_operation_has_a_name_of_its_own() {
        let description = description();
        let mut ids = HashSet::new();
        for (name, operation) in each(&description) {
            let id = operation["operationId"].as_str().unwrap().to_owned();
            let is_word = id
                .bytes()
                .all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            assert!(is_word && !id.is_empty(), "{name}: {id}");
            assert!(ids.insert(id.clone()), "{name}: {id} is another's, too");
        }
        assert!(ids.len() >= 62);
    }

    #[test]
    fn every_reference_leads_somewhere_and_every_schema_is_used() {
        fn references(value: &Value, found: &mut BTreeSet<String>) {
            match value {
                Value::Object(members) => {
                    if let Some(Value::String(reference)) = members.get("$ref") {
                        found.insert(reference.clone());
                    }
                    members
                        .values()
                        .for_each(|member| references(member, found));
                }
                Value::Array(items) => items.iter().for_each(|item| references(item, found)),
                _ => {}
            }
        }
        let description = description();
        let mut found = BTreeSet::new();
        references(&description, &mut found);
        assert!(found.len() > 50);
        for reference in &found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(description.pointer(pointer).is_some(), "{reference}");
        }
        for name in description["components"]["schemas"]
            .as_object()
            .unwrap()
            .keys()
        {
            let reference = format!("#/components/schemas/{name}");
            assert!(found.contains(&reference), "{name} is used nowhere");
        }
    }

    /// Whether a property that is a text is one of a list of words.
    fn is_of_a_list(description: &Value, property: &Value) -> bool {
        if let Some(reference) = property["$ref"].as_str() {
            let found = description.pointer(reference.trim_start_matches('#'));
            return found.is_some_and(|found| is_of_a_list(description, found));
        }
        if let Some(forms) = property["oneOf"].as_array() {
            return forms.iter().all(|form| is_of_a_list(description, form));
        }
        let is_text = match &property["type"] {
            Value::Array(types) => types.iter().any(|found| found == "string"),
            found => found == "string",
        };
        !is_text || property["enum"].is_array()
    }

    #[test]
    fn words_that_say_how_something_is_are_listed() {
        let description = description();
        let schemas = description["components"]["schemas"].as_object().unwrap();
        let mut found = 0;
        for (name, schema) in schemas {
            let properties = schema["properties"].as_object();
            for (field, property) in properties.into_iter().flatten() {
                let is_word = [
                    "state", "status", "result", "cause", "misfire", "pickup", "ordering",
                ]
                .contains(&field.as_str());
                if is_word || (name == "Received" && field == "reason") {
                    found += 1;
                    assert!(is_of_a_list(&description, property), "{name}.{field}");
                }
            }
        }
        assert!(found >= 16, "{found}");
        let text = serde_json::json!({"oneOf": [{"type": "null"}, {"type": "string"}]});
        assert!(!is_of_a_list(&description, &text));
        let results = &description["components"]["schemas"]["OutcomeResult"]["enum"];
        let results = results.as_array().unwrap();
        assert!(results.len() == 11 && results.contains(&Value::from("blocked")));
    }

    /// An empty body counts as `{}`.
    #[test]
    fn a_body_that_must_say_something_is_needed() {
        let description = description();
        let mut found = 0;
        for (name, operation) in each(&description) {
            let body = &operation["requestBody"];
            let types = body["content"].as_object();
            let Some(json) = types.and_then(|types| types.get("application/json")) else {
                continue;
            };
            if types.is_some_and(|types| types.len() > 1) {
                // Publishing to a topic, where an empty body is an empty payload.
                assert_eq!(body["required"], false, "{name}");
                continue;
            }
            let reference = json["schema"]["$ref"].as_str().unwrap();
            let schema = description.pointer(&reference[1..]).unwrap();
            let must = schema["required"].as_array();
            // Its members are optional, and one of two must be given.
            let is_either = name == "post /v1/queues/{queue}/in-flight/expire";
            let is_needed = is_either || must.is_some_and(|must| !must.is_empty());
            assert_eq!(body["required"], is_needed, "{name}");
            found += usize::from(is_needed);
        }
        assert!(found >= 10, "{found}");
    }

    #[test]
    fn every_operation_says_what_the_layers_around_it_answer() {
        let description = description();
        for (name, operation) in each(&description) {
            let responses = operation["responses"].as_object().unwrap();
            for kind in EVERYWHERE {
                let status = kind.status().to_string();
                assert!(responses.contains_key(&status), "{name}: {status}");
            }
            if operation.get("requestBody").is_some() {
                for status in ["400", "408", "413", "415", "422"] {
                    assert!(responses.contains_key(status), "{name}: {status}");
                }
            }
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                let place = parameter["in"].as_str().unwrap();
                assert!(["path", "query", "header"].contains(&place), "{name}");
                assert!(place != "path" || parameter["required"] == true, "{name}");
            }
        }
    }
}
