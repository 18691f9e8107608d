//! A client of server-sent events, as the HTML standard has it.

use reqwest::Response;
use serde_json::Value;

/// One event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// The last id so far.
    pub id: i64,
    /// `message` when the server gave none.
    pub name: String,
    /// Its data, as JSON.
    pub data: Value,
}

/// A stream of events.
#[derive(Debug)]
pub struct Events {
    response: Response,
    text: Vec<u8>,
    /// Up to here there is no end of an event in the text.
    searched: usize,
    last_id: i64,
    /// Comments seen.
    pub comments: usize,
}

impl Events {
    /// Follows a stream; `query` without `?`.
    ///
    /// # Panics
    /// When the answer is not 200.
    pub async fn open(url: &str, last_id: Option<i64>) -> Self {
        let mut request = reqwest::Client::new().get(url);
        request = request.header("accept", "text/event-stream");
        if let Some(id) = last_id {
            request = request.header("last-event-id", id.to_string());
        }
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        Self {
            response,
            text: Vec::new(),
            searched: 0,
            last_id: last_id.unwrap_or(0),
            comments: 0,
        }
    }

    /// The next event; `None` at the end of the answer.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.next_block().await? {
                return Some(event);
            }
        }
    }

    /// What comes next: an event, or inside `Some(None)` a comment or an id alone.
    pub async fn next_block(&mut self) -> Option<Option<Event>> {
        loop {
            let mut pairs = self.text[self.searched..].windows(2);
            if let Some(end) = pairs.position(|pair| pair == b"\n\n") {
                let end = self.searched + end + 2;
                let block: Vec<u8> = self.text.drain(..end).collect();
                self.searched = 0;
                return Some(self.read(&String::from_utf8(block).unwrap()));
            }
            self.searched = self.text.len().saturating_sub(1);
            match self.response.chunk().await.unwrap() {
                Some(bytes) => self.text.extend_from_slice(&bytes),
                None => {
                    assert!(self.text.is_empty(), "the answer ends inside of an event");
                    return None;
                }
            }
        }
    }

    /// The last id so far, also that of a heartbeat.
    pub fn last_id(&self) -> i64 {
        self.last_id
    }

    fn read(&mut self, block: &str) -> Option<Event> {
        let (mut name, mut data) = ("message", Vec::new());
        for line in block.lines() {
            match line.split_once(": ") {
                Some(("", _)) => self.comments += 1,
                Some(("id", id)) => self.last_id = id.parse().unwrap(),
                Some(("event", text)) => name = text,
                Some(("data", text)) => data.push(text),
                _ => {}
            }
        }
        (!data.is_empty()).then(|| Event {
            id: self.last_id,
            name: name.to_owned(),
            data: serde_json::from_str(&data.join("\n")).unwrap(),
        })
    }
}
