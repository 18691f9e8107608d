//! The metrics as text: OpenMetrics if the client asks for it, otherwise the older format, which every scraper reads.
//!
//! The two differ in form. In the older one a family has the name of its samples, so a counter's family ends in `_total`; a
//! parser that knows only this one takes OpenMetrics' `# TYPE x counter` for a family without samples, and `x_total` for
//! one without a type.

use axum::http::HeaderMap;

use super::accept::{self, wanted};

/// A format of the metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// Of <https://openmetrics.io>.
    OpenMetrics,
    /// The text format 0.0.4 of Prometheus.
    Text,
}

impl Format {
    /// The one that a scraper asks for.
    pub(super) fn asked(headers: &HeaderMap) -> Self {
        let open = wanted(headers, "application/openmetrics-text", &["1.0.0", "0.0.1"]);
        let text = wanted(headers, "text/plain", &["0.0.4"]);
        match accept::is_rather(open, text) {
            true => Self::OpenMetrics,
            false => Self::Text,
        }
    }

    pub(super) const fn content_type(self) -> &'static str {
        match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
        }
    }

    /// OpenMetrics in this format.
    pub(super) fn print(self, open: String) -> String {
        match self {
            Self::OpenMetrics => open,
            Self::Text => text(&open),
        }
    }
}

/// The suffix that samples of a type have and the family has not.
fn suffix(kind: &str) -> &'static str {
    match kind {
        "counter" => "_total",
        "info" => "_info",
        _ => "",
    }
}

fn text(open: &str) -> String {
    let mut out = String::with_capacity(open.len() + open.len() / 64);
    let mut lines = open.lines().peekable();
    while let Some(line) = lines.next() {
        let Some(comment) = line.strip_prefix("# ") else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let (what, rest) = comment.split_once(' ').unwrap_or((comment, ""));
        let (name, value) = rest.split_once(' ').unwrap_or((rest, ""));
        match what {
            // Its name is that of the samples, by the type, which comes next.
            "HELP" => {
                let kind = lines.peek().and_then(|next| {
                    let (named, kind) = next.strip_prefix("# TYPE ")?.split_once(' ')?;
                    (named == name).then_some(kind)
                });
                let suffix = suffix(kind.unwrap_or_default());
                let value = value.replace("\\\"", "\"");
                out.push_str(&format!("# HELP {name}{suffix} {value}\n"));
            }
            "TYPE" => {
                let kind = match value {
                    "info" | "stateset" => "gauge",
                    "unknown" => "untyped",
                    known => known,
                };
                out.push_str(&format!("# TYPE {name}{} {kind}\n", suffix(value)));
            }
            // `UNIT` and `EOF` are of OpenMetrics alone.
            _ => {}
        }
    }
    out
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use axum::http::header::ACCEPT;

    use super::*;

    #[test]
    fn a_scraper_gets_what_it_asks_for() {
        let prometheus = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,\
                          application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;q=0.3,\
                          text/plain;version=0.0.4;q=0.2,*/*;q=0.1";
        for (accept, format) in [
            (prometheus, Format::OpenMetrics),
            ("application/openmetrics-text", Format::OpenMetrics),
            (
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
                Format::OpenMetrics,
            ),
            ("application/openmetrics-text; version=9.0.0", Format::Text),
            ("application/openmetrics-text;q=0", Format::Text),
            (
                "application/openmetrics-text;q=0.1, text/plain;version=0.0.4",
                Format::Text,
            ),
            ("text/plain;version=0.0.4", Format::Text),
            ("text/plain", Format::Text),
            ("*/*", Format::Text),
            ("", Format::Text),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, accept.parse().unwrap());
            assert_eq!(Format::asked(&headers), format, "{accept}");
        }
        assert_eq!(Format::asked(&HeaderMap::new()), Format::Text);
    }

    #[test]
    fn families_have_the_names_of_their_samples() {
        let open = "# HELP a Says \\\"so\\\".\n# TYPE a counter\na_total{x=\"# y\"} 1\n\
                    # HELP b_seconds B.\n# TYPE b_seconds histogram\n# UNIT b_seconds seconds\nb_seconds_bucket{le=\"+Inf\"} 0\n\
                    # HELP c C.\n# TYPE c unknown\nc 3\n# HELP d D.\n# TYPE d info\nd_info{v=\"1\"} 1\n# EOF\n";
        let text = "# HELP a_total Says \"so\".\n# TYPE a_total counter\na_total{x=\"# y\"} 1\n\
                    # HELP b_seconds B.\n# TYPE b_seconds histogram\nb_seconds_bucket{le=\"+Inf\"} 0\n\
                    # HELP c C.\n# TYPE c untyped\nc 3\n# HELP d_info D.\n# TYPE d_info gauge\nd_info{v=\"1\"} 1\n";
        assert_eq!(Format::Text.print(open.to_owned()), text);
        assert_eq!(Format::OpenMetrics.print(open.to_owned()), open);
    }
}
