//! Errors as one line of text.

use std::error::Error;

/// An error and its causes, the outermost first: `connecting failed: connection refused`.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Link(&'static str, #[source] Option<Box<Link>>);

    #[test]
    fn causes_follow_the_error_that_they_caused() {
        let alone = Link("it failed", None);
        assert_eq!(chain(&alone), "it failed");
        let inner = Link("connecting failed", Some(Box::new(Link("no route", None))));
        let all = Link("it failed", Some(Box::new(inner)));
        assert_eq!(chain(&all), "it failed: connecting failed: no route");
    }
}
