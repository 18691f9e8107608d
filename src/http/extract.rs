//! The inputs that handlers take from requests: names in the path, query parameters, bodies. Every rejection is a
//! [`Problem`].

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::time::Duration;

use axum::extract::{FromRequest, FromRequestParts, RawPathParams, Request};
use axum::http::HeaderMap;
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use super::budget::SMALL_BYTES;
use super::problem::{FieldError, Kind, Place, Problem};
use super::state::{LARGE_BYTES, State};
pub(in crate::http) use super::whole::{Whole, discard, too_large};
use crate::domain::objects::Objects;

/// The largest body of a verb, which names up to 1,000 deliveries with their reasons.
pub(in crate::http) const VERB_MAX_BYTES: usize = 8 << 20;
/// The largest body with a payload in it.
pub(in crate::http) const PAYLOAD_MAX_BYTES: usize = usize::MAX;

/// A JSON body of so many bytes at most. An empty one counts as `{}`, and so does the content type that `curl -d` sends.
#[derive(Debug)]
pub(in crate::http) struct Json<T, const MAX_BYTES: usize = SMALL_BYTES>(pub(in crate::http) T);

impl<T: DeserializeOwned + Send + 'static, const MAX_BYTES: usize> FromRequest<State>
    for Json<T, MAX_BYTES>
{
    type Rejection = Problem;

    async fn from_request(request: Request, state: &State) -> Result<Self, Problem> {
        require_json(request.headers())?;
        // Boxed: what reads the body is larger than what waits for messages afterwards, and has no place beside it.
        let Whole(bytes) = Box::pin(Whole::within(request, state, MAX_BYTES)).await?;
        let length = bytes.len();
        let parse = move || parse_json(if bytes.is_empty() { b"{}" } else { &bytes });
        match length <= LARGE_BYTES {
            true => parse(),
            false => Box::pin(state.beside(parse)).await,
        }
        .map(Self)
    }
}

/// Refuses a content type that is not JSON; none counts as JSON, and so does what `curl -d` sends. A page of another site could send
/// both without asking first: what keeps it out is the door, since a browser says with either whose page asks.
pub(in crate::http) fn require_json(headers: &HeaderMap) -> Result<(), Problem> {
    let Some(found) = headers.get(CONTENT_TYPE) else {
        return Ok(());
    };
    let text = found.to_str().unwrap_or_default();
    let essence = text.split(';').next().unwrap_or_default().trim();
    let is_json = ["application/json", "application/x-www-form-urlencoded", ""]
        .iter()
        .any(|known| essence.eq_ignore_ascii_case(known))
        || is_json_suffixed(essence);
    match is_json {
        true => Ok(()),
        false => Err(Problem::new(
            Kind::UnsupportedMediaType,
            "the body must be `application/json`",
        )),
    }
}

/// `application/anything+json` (RFC 6839).
fn is_json_suffixed(essence: &str) -> bool {
    let essence = essence.to_ascii_lowercase();
    essence.starts_with("application/") && essence.ends_with("+json")
}

/// Parses JSON: bad syntax is 400, a value of the wrong type or an unknown field 422 with its place.
///
/// serde_json stops at 128 levels of nesting, so a deep body is refused without recursing further.
pub(in crate::http) fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    // The place of a fault is looked for only when there is one.
    let mut plain = serde_json::Deserializer::from_slice(bytes);
    if let Ok(value) = T::deserialize(Objects(&mut plain))
        && plain.end().is_ok()
    {
        return Ok(value);
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let mut track = serde_path_to_error::Track::new();
    let tracked = serde_path_to_error::Deserializer::new(&mut deserializer, &mut track);
    let error = match T::deserialize(Objects(tracked)) {
        Ok(value) => match deserializer.end() {
            Ok(()) => return Ok(value),
            Err(error) => error,
        },
        Err(error) => error,
    };
    if error.classify() != serde_json::error::Category::Data {
        let detail = format!("the body is not valid JSON: {error}");
        return Err(Problem::new(Kind::MalformedRequest, detail));
    }
    // The pointer says where it is; serde_json says it in lines and columns, and always last.
    let text = error.to_string();
    let position = format!(" at line {} column {}", error.line(), error.column());
    let detail = text.strip_suffix(&position).unwrap_or(&text);
    Err(Problem::invalid(vec![FieldError {
        place: Place::Pointer(pointer(&track.path(), detail)),
        detail: detail.to_owned(),
        allowed: None,
    }]))
}

/// The path as a JSON pointer, ending at the unknown field if that is what the fault is.
fn pointer(path: &serde_path_to_error::Path, detail: &str) -> String {
    use serde_path_to_error::Segment;
    let mut pointer = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => pointer.push_str(&format!("/{index}")),
            Segment::Map { key } | Segment::Enum { variant: key } => {
                pointer.push('/');
                pointer.push_str(&key.replace('~', "~0").replace('/', "~1"));
            }
            Segment::Unknown => {}
        }
    }
    let field = detail
        .strip_prefix("missing field `")
        .and_then(|rest| rest.split('`').next());
    if let Some(field) = field {
        pointer.push('/');
        pointer.push_str(field);
    }
    pointer
}

/// A part of the path, parsed.
pub(in crate::http) trait PathPart: Sized {
    /// The parameter's name in the route.
    const PARAMETER: &'static str;

    /// Parses it; the error completes "`text` …".
    fn parse(text: &str) -> Result<Self, String>;
}

macro_rules! path_parts {
    ($($name:ident = $parameter:literal),*) => {$(
        impl PathPart for crate::domain::name::$name {
            const PARAMETER: &'static str = $parameter;

            fn parse(text: &str) -> Result<Self, String> {
                Self::parse(text).map_err(|error| error.to_string())
            }
        }
    )*};
}

path_parts!(
    Topic = "topic",
    // A topic is its own pattern, and stands at the same place of the path.
    TopicPattern = "topic",
    StreamName = "stream",
    QueueName = "queue",
    OriginName = "origin",
    ScheduleName = "name",
    LockName = "name"
);

/// The number of a rejected outbox row.
#[derive(Debug, Clone, Copy)]
pub(in crate::http) struct RejectedId(pub(in crate::http) i64);

impl PathPart for RejectedId {
    const PARAMETER: &'static str = "id";

    fn parse(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(id) if id >= 1 => Ok(Self(id)),
            _ => Err("must be an integer of at least 1".to_owned()),
        }
    }
}

/// The offset of a message.
#[derive(Debug, Clone, Copy)]
pub(in crate::http) struct MessageOffset(pub(in crate::http) crate::domain::id::Offset);

impl PathPart for MessageOffset {
    const PARAMETER: &'static str = "offset";

    fn parse(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(offset) if (1..=9_007_199_254_740_991).contains(&offset) => {
                Ok(Self(crate::domain::id::Offset(offset)))
            }
            _ => Err("must be an integer from 1 to 9007199254740991".to_owned()),
        }
    }
}

/// An ordering key.
#[derive(Debug, Clone)]
pub(in crate::http) struct Key(pub(in crate::http) String);

impl PathPart for Key {
    const PARAMETER: &'static str = "key";

    fn parse(text: &str) -> Result<Self, String> {
        if (1..=512).contains(&text.len()) && !text.contains('\0') {
            Ok(Self(text.to_owned()))
        } else {
            Err("must be 1 to 512 bytes long, without the character U+0000".to_owned())
        }
    }
}

/// Takes a part out of the path.
#[derive(Debug)]
pub(in crate::http) struct Named<T>(pub(in crate::http) T);

impl<T: PathPart + Send, S: Send + Sync> FromRequestParts<S> for Named<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let params = RawPathParams::from_request_parts(parts, state)
            .await
            .map_err(|_| Problem::parameter(T::PARAMETER, "the path is not UTF-8"))?;
        let text = params
            .iter()
            .find(|(name, _)| *name == T::PARAMETER)
            .map_or("", |(_, value)| value);
        T::parse(text).map(Self).map_err(|error| {
            let shown: String = text.chars().take(100).collect();
            Problem::parameter(T::PARAMETER, format!("`{shown}` {error}"))
        })
    }
}

/// The query's parameters. Take them out by name, then call [`Query::finish`]: parameters that were not taken are unknown, and
/// refused.
#[derive(Debug)]
pub(in crate::http) struct Query {
    pairs: Vec<(String, String)>,
    known: Vec<&'static str>,
    errors: Vec<FieldError>,
}

impl<S: Send + Sync> FromRequestParts<S> for Query {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        Self::parse(parts.uri.query().unwrap_or_default())
    }
}

impl Query {
    fn parse(query: &str) -> Result<Self, Problem> {
        let decode = |text: &str| {
            percent_encoding::percent_decode_str(&text.replace('+', " "))
                .decode_utf8()
                .map(std::borrow::Cow::into_owned)
                .map_err(|_| Problem::new(Kind::MalformedRequest, "the query is not UTF-8"))
        };
        let mut pairs = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            pairs.push((decode(name)?, decode(value)?));
        }
        Ok(Self {
            pairs,
            known: Vec::new(),
            errors: Vec::new(),
        })
    }

    /// All values of a parameter that may be repeated.
    pub(in crate::http) fn texts(&mut self, name: &'static str) -> Vec<String> {
        self.known.push(name);
        let (taken, kept) = std::mem::take(&mut self.pairs)
            .into_iter()
            .partition(|(found, _)| found == name);
        self.pairs = kept;
        let taken: Vec<(String, String)> = taken;
        let mut values = Vec::with_capacity(taken.len());
        for (_, value) in taken {
            // Nothing that is stored has it: Postgres takes no text with it.
            if value.contains('\0') {
                let detail = format!("`{name}` must not contain the character U+0000");
                self.fault(name, detail, None);
            }
            values.push(value);
        }
        values
    }

    /// A parameter.
    pub(in crate::http) fn text(&mut self, name: &'static str) -> Option<String> {
        let mut values = self.texts(name);
        if values.len() > 1 {
            self.fault(name, format!("`{name}` is given more than once"), None);
        }
        values.pop()
    }

    /// The parameter `key`: an ordering key.
    pub(in crate::http) fn key(&mut self) -> Option<String> {
        let key = self.text("key");
        let is_valid = |key: &String| (1..=512).contains(&key.len());
        if !key.as_ref().is_none_or(is_valid) {
            self.fault("key", "`key` must be 1 to 512 bytes long".to_owned(), None);
        }
        key
    }

    /// A parameter, parsed; the error completes "`text` …".
    pub(in crate::http) fn parsed<T, E: Display>(
        &mut self,
        name: &'static str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let text = self.text(name)?;
        match parse(&text) {
            Ok(value) => Some(value),
            Err(error) => {
                let shown: String = text.chars().take(100).collect();
                self.fault(name, format!("`{shown}` {error}"), None);
                None
            }
        }
    }

    /// An integer in a range.
    pub(in crate::http) fn integer(
        &mut self,
        name: &'static str,
        range: RangeInclusive<i64>,
    ) -> Option<i64> {
        let text = self.text(name)?;
        match text.parse::<i64>() {
            Ok(value) if range.contains(&value) => Some(value),
            _ => {
                let allowed = format!("an integer from {} to {}", range.start(), range.end());
                self.fault(name, format!("`{name}` must be {allowed}"), Some(allowed));
                None
            }
        }
    }

    /// Notes a fault of a parameter.
    pub(in crate::http) fn fault(
        &mut self,
        name: &'static str,
        detail: String,
        allowed: Option<String>,
    ) {
        self.errors.push(FieldError {
            place: Place::Parameter(name.into()),
            detail,
            allowed,
        });
    }

    /// Refuses the request if faults were noted, or if parameters are left that nobody asked for.
    pub(in crate::http) fn finish(mut self) -> Result<(), Problem> {
        for (name, _) in std::mem::take(&mut self.pairs).into_iter().take(20) {
            let shown: String = name.chars().take(100).collect();
            self.errors.push(FieldError {
                detail: format!("there is no parameter `{shown}`"),
                place: Place::Parameter(shown.into()),
                allowed: (!self.known.is_empty()).then(|| self.known.join(", ")),
            });
        }
        if self.errors.is_empty() {
            Ok(())
        } else {
            Err(Problem::invalid(self.errors))
        }
    }
}

/// Checks the fields of a parsed body against their ranges and gathers all that do not fit.
#[derive(Debug, Default)]
pub(in crate::http) struct Check {
    errors: Vec<FieldError>,
}

impl Check {
    /// Notes a fault at a JSON pointer.
    pub(in crate::http) fn fault(&mut self, pointer: impl Into<String>, detail: impl Into<String>) {
        if self.errors.len() < 100 {
            self.errors.push(FieldError {
                place: Place::Pointer(pointer.into()),
                detail: detail.into(),
                allowed: None,
            });
        }
    }

    fn out_of_range(&mut self, pointer: &str, allowed: String) {
        let name = pointer.rsplit('/').next().unwrap_or_default();
        self.fault(pointer, format!("`{name}` must be {allowed}"));
        if let Some(error) = self.errors.last_mut() {
            error.allowed = Some(allowed);
        }
    }

    /// An integer in a range; the range's start stands in for one that is not.
    pub(in crate::http) fn integer(
        &mut self,
        pointer: &str,
        value: i64,
        range: RangeInclusive<i64>,
    ) -> i64 {
        if range.contains(&value) {
            return value;
        }
        let (start, end) = (*range.start(), *range.end());
        self.out_of_range(pointer, format!("an integer from {start} to {end}"));
        start
    }

    /// A number in a range.
    pub(in crate::http) fn number(
        &mut self,
        pointer: &str,
        value: f64,
        range: RangeInclusive<f64>,
    ) -> f64 {
        if range.contains(&value) {
            return value;
        }
        let (start, end) = (*range.start(), *range.end());
        self.out_of_range(pointer, format!("a number from {start} to {end}"));
        start
    }

    /// Seconds in a range.
    pub(in crate::http) fn seconds(
        &mut self,
        pointer: &str,
        value: f64,
        range: RangeInclusive<f64>,
    ) -> Duration {
        Duration::from_secs_f64(self.number(pointer, value, range))
    }

    /// A text of at least 1 and at most this many bytes, without the character that Postgres cannot store.
    pub(in crate::http) fn text(&mut self, pointer: &str, value: &str, max_bytes: usize) {
        if value.is_empty() || value.len() > max_bytes {
            self.out_of_range(pointer, format!("1 to {max_bytes} bytes long"));
        } else if value.contains('\0') {
            self.fault(pointer, "the character U+0000 is not allowed");
        }
    }

    /// A text of at least 1 and at most this many visible ASCII characters.
    pub(in crate::http) fn token(&mut self, pointer: &str, value: &str, max_bytes: usize) {
        let is_token = value.bytes().all(|byte| byte.is_ascii_graphic());
        if value.is_empty() || value.len() > max_bytes || !is_token {
            let allowed = format!("1 to {max_bytes} visible ASCII characters, without spaces");
            self.out_of_range(pointer, allowed);
        }
    }

    /// A name or pattern, parsed; the error completes "`text` …".
    pub(in crate::http) fn parsed<T, E: Display>(
        &mut self,
        pointer: &str,
        text: &str,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        match parse(text) {
            Ok(value) => Some(value),
            Err(error) => {
                let shown: String = text.chars().take(100).collect();
                self.fault(pointer, format!("`{shown}` {error}"));
                None
            }
        }
    }

    /// Refuses the request if faults were noted.
    pub(in crate::http) fn finish(self) -> Result<(), Problem> {
        if self.errors.is_empty() {
            Ok(())
        } else {
            Err(Problem::invalid(self.errors))
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only parsed")]
    struct Outer {
        count: Option<i64>,
        inner: Vec<Inner>,
    }

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only parsed")]
    struct Inner {
        name: String,
    }

    #[test]
    fn json_faults_have_their_place() {
        for (body, kind, pointer) in [
            ("{", Kind::MalformedRequest, ""),
            ("{\"inner\":[]} x", Kind::MalformedRequest, ""),
            ("{\"inner\":[],\"other\":1}", Kind::InvalidRequest, "/other"),
            ("{}", Kind::InvalidRequest, "/inner"),
            (
                "{\"count\":\"x\",\"inner\":[]}",
                Kind::InvalidRequest,
                "/count",
            ),
            (
                "{\"inner\":[{\"name\":1}]}",
                Kind::InvalidRequest,
                "/inner/0/name",
            ),
            (
                "{\"inner\":[{\"name\":\"a\"},{\"no/me\":1}]}",
                Kind::InvalidRequest,
                "/inner/1/no~1me",
            ),
            ("[]", Kind::InvalidRequest, ""),
        ] {
            let problem = parse_json::<Outer>(body.as_bytes()).unwrap_err();
            assert_eq!(problem.kind, kind, "{body}");
            let is_placed = problem.detail.contains(" column ");
            assert_eq!(is_placed, kind == Kind::MalformedRequest, "{problem:?}");
            if kind == Kind::InvalidRequest && body != "[]" {
                assert_eq!(
                    problem.errors[0].place,
                    Place::Pointer(pointer.into()),
                    "{body} {problem:?}"
                );
            }
        }
        let quoted = parse_json::<Outer>(br#"{"inner":[],"count":" at line 1"}"#).unwrap_err();
        assert!(quoted.detail.ends_with("expected i64"), "{quoted:?}");
        let deep = "[".repeat(100_000);
        assert_eq!(
            parse_json::<Outer>(deep.as_bytes()).unwrap_err().kind,
            Kind::InvalidRequest
        );
        let deep = format!("{{\"x\":{deep}");
        parse_json::<Outer>(deep.as_bytes()).unwrap_err();
    }

    #[test]
    fn queries_are_taken_apart() {
        let mut query = Query::parse("after=5&topic=a.*&topic=b%2E%3E&x=1&limit=0").unwrap();
        assert_eq!(query.integer("after", 0..=10), Some(5));
        assert_eq!(query.texts("topic"), ["a.*", "b.>"]);
        assert_eq!(query.integer("limit", 1..=10), None);
        let problem = query.finish().unwrap_err();
        let details: Vec<&str> = problem.errors.iter().map(|e| e.detail.as_str()).collect();
        assert_eq!(
            details,
            [
                "`limit` must be an integer from 1 to 10",
                "there is no parameter `x`"
            ]
        );
        assert!(Query::parse("a=%ff").is_err());
    }
}
