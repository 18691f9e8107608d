//! Finds the patterns that match a topic by the topic's tokens, without looking at each pattern: with 10,000 queues a
//! message costs only the patterns that it matches.

use std::collections::{BTreeSet, HashMap};

use super::name::{Topic, TopicPattern};

/// Values under patterns. A value may stand under several patterns, and is found once.
#[derive(Debug, Clone)]
pub struct TopicIndex<T> {
    root: Node<T>,
}

/// The patterns that begin with the same tokens.
#[derive(Debug, Clone)]
struct Node<T> {
    /// By the next token.
    children: HashMap<Box<str>, Node<T>>,
    /// Patterns with `*` next.
    any: Option<Box<Node<T>>>,
    /// Patterns with `>` next.
    rest: BTreeSet<T>,
    /// Patterns that end here.
    here: BTreeSet<T>,
}

impl<T> Default for TopicIndex<T> {
    fn default() -> Self {
        Self {
            root: Node::default(),
        }
    }
}

impl<T> Default for Node<T> {
    fn default() -> Self {
        Self {
            children: HashMap::new(),
            any: None,
            rest: BTreeSet::new(),
            here: BTreeSet::new(),
        }
    }
}

impl<T: Ord + Copy> TopicIndex<T> {
    /// Puts a value under a pattern.
    pub fn insert(&mut self, pattern: &TopicPattern, value: T) {
        let mut node = &mut self.root;
        for token in pattern.as_str().split('.') {
            node = match token {
                ">" => {
                    node.rest.insert(value);
                    return;
                }
                "*" => node.any.get_or_insert_default(),
                token => node.children.entry(token.into()).or_default(),
            };
        }
        node.here.insert(value);
    }

    /// Takes a value away from a pattern.
    pub fn remove(&mut self, pattern: &TopicPattern, value: T) {
        self.root.remove(Some(pattern.as_str()), value);
    }

    /// The values whose patterns match, each once, ascending.
    #[must_use]
    pub fn matching(&self, topic: &Topic) -> Vec<T> {
        let mut found = Vec::new();
        self.root.find(Some(topic.as_str()), &mut found);
        found.sort_unstable();
        found.dedup();
        found
    }
}

impl<T: Ord + Copy> Node<T> {
    fn is_empty(&self) -> bool {
        self.children.is_empty()
            && self.any.is_none()
            && self.rest.is_empty()
            && self.here.is_empty()
    }

    /// Leaves no empty nodes behind.
    fn remove(&mut self, left: Option<&str>, value: T) {
        let Some(left) = left else {
            self.here.remove(&value);
            return;
        };
        let (token, left) = split(left);
        match token {
            ">" => {
                self.rest.remove(&value);
            }
            "*" => {
                if let Some(any) = &mut self.any {
                    any.remove(left, value);
                    self.any.take_if(|any| any.is_empty());
                }
            }
            token => {
                if let Some(child) = self.children.get_mut(token) {
                    child.remove(left, value);
                    if child.is_empty() {
                        self.children.remove(token);
                    }
                }
            }
        }
    }

    fn find(&self, left: Option<&str>, found: &mut Vec<T>) {
        let Some(left) = left else {
            found.extend(&self.here);
            return;
        };
        found.extend(&self.rest);
        let (token, left) = split(left);
        if let Some(child) = self.children.get(token) {
            child.find(left, found);
        }
        if let Some(any) = &self.any {
            any.find(left, found);
        }
    }
}

/// The first token, and the rest after it.
fn split(text: &str) -> (&str, Option<&str>) {
    match text.split_once('.') {
        Some((token, left)) => (token, Some(left)),
        None => (text, None),
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pattern() -> impl Strategy<Value = TopicPattern> {
        let token = prop_oneof!["[ab]", "[ab]", Just("*".to_owned())];
        (proptest::collection::vec(token, 1..4), any::<bool>()).prop_map(|(tokens, has_rest)| {
            let mut text = tokens.join(".");
            if has_rest {
                text.push_str(".>");
            }
            TopicPattern::parse(&text).unwrap()
        })
    }

    fn topic() -> impl Strategy<Value = Topic> {
        proptest::collection::vec("[ab]", 1..5)
            .prop_map(|tokens| Topic::parse(&tokens.join(".")).unwrap())
    }

    proptest! {
        #[test]
        fn it_finds_what_looking_at_each_finds(
            patterns in proptest::collection::vec((pattern(), 0..8u8), 0..30),
            removed in proptest::collection::vec(any::<prop::sample::Index>(), 0..10),
            topics in proptest::collection::vec(topic(), 1..20),
        ) {
            let mut patterns: Vec<_> = patterns;
            let mut index = TopicIndex::default();
            for (pattern, value) in &patterns {
                index.insert(pattern, *value);
            }
            for place in removed {
                if !patterns.is_empty() {
                    let gone = patterns[place.index(patterns.len())].clone();
                    index.remove(&gone.0, gone.1);
                    patterns.retain(|other| *other != gone);
                }
            }
            for topic in topics {
                let matching = patterns.iter().filter(|(pattern, _)| pattern.matches(&topic));
                let expected: BTreeSet<u8> = matching.map(|(_, value)| *value).collect();
                prop_assert_eq!(index.matching(&topic), expected.into_iter().collect::<Vec<_>>());
            }
            for (pattern, value) in patterns {
                index.remove(&pattern, value);
            }
            prop_assert!(index.root.is_empty(), "no empty nodes are left");
        }
    }

    #[test]
    fn the_rest_alone_matches_all() {
        let mut index = TopicIndex::default();
        index.insert(&TopicPattern::parse(">").unwrap(), 1);
        assert_eq!(index.matching(&Topic::parse("a").unwrap()), [1]);
        assert_eq!(index.matching(&Topic::parse("a.b.c").unwrap()), [1]);
    }
}
