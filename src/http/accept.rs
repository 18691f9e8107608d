//! The media type that a client prefers, by `Accept` (RFC 9110, 12.5.1).

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;

/// One range of `Accept`.
struct Range<'h> {
    kind: &'h str,
    parameters: Vec<&'h str>,
    /// In thousandths; 0 is a no.
    quality: u16,
}

/// How much a type is wanted: the range that says most of it counts, and among those the first. None where no range names it, or
/// only with other parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    /// In thousandths; 0 is a no.
    pub(super) quality: u16,
    /// The place of its range among those of the header.
    pub(super) place: usize,
}

fn ranges(headers: &HeaderMap) -> impl Iterator<Item = Range<'_>> {
    let values = headers.get_all(ACCEPT).into_iter();
    values
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|range| {
            let mut parts = range.split(';').map(str::trim);
            let kind = parts.next().unwrap_or_default();
            let (mut parameters, mut quality) = (Vec::new(), 1_000);
            for parameter in parts {
                match parameter.split_once('=') {
                    Some((name, value)) if name.trim_end().eq_ignore_ascii_case("q") => {
                        quality = thousandths(value.trim_start());
                    }
                    _ => parameters.push(parameter),
                }
            }
            Range {
                kind,
                parameters,
                quality,
            }
        })
}

/// An unreadable quality counts as zero.
fn thousandths(text: &str) -> u16 {
    match text.parse::<f32>() {
        Ok(quality) if (0.0..=1.0).contains(&quality) => (quality * 1_000.0).round() as u16,
        _ => 1_000,
    }
}

/// How much a type is wanted that is named in full: by `type/subtype`, and where ranges have parameters, by any of `versions`.
pub(super) fn wanted(headers: &HeaderMap, kind: &str, versions: &[&str]) -> Option<Wanted> {
    let fits = |parameter: &&str| match parameter.split_once('=') {
        Some((name, value)) if name.trim_end().eq_ignore_ascii_case("version") => {
            versions.contains(&value.trim().trim_matches('"'))
        }
        // `charset=utf-8`, say.
        _ => true,
    };
    let named = ranges(headers).enumerate().filter(|(_, range)| {
        range.kind.eq_ignore_ascii_case(kind) && range.parameters.iter().all(fits)
    });
    let wanted = named.map(|(place, range)| Wanted {
        quality: range.quality,
        place,
    });
    wanted.reduce(|best, next| match next.quality > best.quality {
        true => next,
        false => best,
    })
}

/// Whether the first is wanted, and not less than the second: as much, if it is named before.
pub(super) fn is_rather(first: Option<Wanted>, second: Option<Wanted>) -> bool {
    match (first, second) {
        (Some(first), Some(second)) if first.quality == second.quality => {
            first.quality > 0 && first.place < second.place
        }
        (Some(first), Some(second)) => first.quality > second.quality,
        (Some(first), None) => first.quality > 0,
        (None, _) => false,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn one_type_is_wanted_rather_than_another() {
        for (accept, is_events) in [
            ("text/event-stream", true),
            ("Text/Event-Stream; charset=utf-8", true),
            ("text/event-stream;q=0", false),
            ("text/event-stream;q=0, application/json", false),
            ("text/event-stream; q=0.0", false),
            ("text/event-stream;q=0.5, application/json;q=0.4", true),
            ("text/event-stream;q=0.4, application/json;q=0.5", false),
            ("text/event-stream;Q=0.4, application/json", false),
            ("application/json;q=0.1, text/event-stream", true),
            ("application/json, text/event-stream", false),
            ("text/event-stream, application/json", true),
            ("text/event-stream;q=0, text/event-stream", true),
            ("application/json;q=0, text/event-stream;q=0", false),
            ("application/json", false),
            ("text/*", false),
            ("*/*", false),
            ("", false),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, accept.parse().unwrap());
            let events = wanted(&headers, "text/event-stream", &[]);
            let json = wanted(&headers, "application/json", &[]);
            assert_eq!(is_rather(events, json), is_events, "{accept}");
        }
    }
}
