//! A person who does to a queue whatever people may, one act after the other, and repeats each until it is answered.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use chrono::Utc;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::WORKERS;
use crate::history::{Act, Asked, Done, Order, Recorder, Redrive, Whose};
use crate::support::Http;
use crate::support::consumer::time;
use crate::support::worker::Dice;

/// Redrives that run at a time.
const REDRIVES_MAX: usize = 3;

pub struct Person {
    pub http: Http,
    pub queue: String,
    pub recorder: Arc<Recorder>,
    pub dice: Dice,
    /// Declarations that the queue changes between, with the order that each stands for.
    pub declarations: Vec<(Value, Order)>,
    pub generation: u64,
    acts: u64,
    running: Vec<(Asked, Redrive)>,
}

/// Whether a message was in the queue: the generation may have begun after it.
fn is_there(status: StatusCode, answer: &Value) -> bool {
    assert!(
        status.is_success() || status == StatusCode::NOT_FOUND,
        "{status} {answer}"
    );
    status.is_success()
}

impl Person {
    pub fn new(http: Http, queue: &str, recorder: Arc<Recorder>, seed: u64) -> Self {
        Self {
            http,
            queue: queue.to_owned(),
            recorder,
            dice: Dice::new(seed),
            declarations: Vec::new(),
            generation: 1,
            acts: 0,
            running: Vec::new(),
        }
    }

    /// Asks until there is an answer that says what happened.
    async fn insist(
        &self,
        method: Method,
        rest: &str,
        body: Option<&Value>,
    ) -> (Asked, StatusCode, Value) {
        let at = Utc::now();
        let path = format!("/v1/queues/{}{rest}", self.queue);
        loop {
            if let Ok((status, answer)) = self.http.call(method.clone(), &path, body).await
                && status != StatusCode::SERVICE_UNAVAILABLE
            {
                let answered = Utc::now();
                return (Asked { at, answered }, status, answer);
            }
            assert!(
                Utc::now() - at < chrono::TimeDelta::seconds(60),
                "{method} {path}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn ok(&self, method: Method, rest: &str, body: Option<&Value>) -> (Asked, Value) {
        let (asked, status, answer) = self.insist(method, rest, body).await;
        assert!(status.is_success(), "{rest} {body:?}: {status} {answer}");
        (asked, answer)
    }

    fn note(&self, asked: Asked, act: Act) {
        self.recorder.lock().done.push(Done { asked, act });
    }

    /// One act.
    pub async fn step(&mut self) {
        self.acts += 1;
        match self.dice.below(100) {
            0..12 => self.delete().await,
            12..24 => self.reject().await,
            24..38 => self.expire().await,
            38..42 => self.seek().await,
            42..44 => self.purge().await,
            44..50 => self.pause().await,
            50..60 => self.remove_letter().await,
            60..78 => self.redrive().await,
            78..84 => self.cancel().await,
            84..92 => self.declare().await,
            _ => self.look().await,
        }
        let pause = self.dice.below(100) as u64;
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }

    /// Sees all redrives to their end.
    pub async fn finish(&mut self) {
        for (asked, mut redrive) in std::mem::take(&mut self.running) {
            let rest = format!("/redrives/{}", redrive.id);
            let ended = crate::support::eventually("the redrive to end", || async {
                let (_, found) = self.ok(Method::GET, &rest, None).await;
                (found["status"] != "running").then_some(found)
            })
            .await;
            redrive.status = ended["status"].as_str().unwrap().to_owned();
            redrive.redriven = ended["redriven"].as_u64().unwrap();
            let answered = Utc::now();
            self.note(Asked { answered, ..asked }, Act::Redriven(redrive));
        }
    }

    /// Removes every dead letter that is not on its way back.
    pub async fn remove_letters(&mut self) {
        for id in self.letters().await {
            self.remove(&id).await;
        }
    }

    fn some_offset(&mut self) -> u64 {
        let newest = self.recorder.lock().published.keys().next_back().copied();
        1 + self.dice.below(newest.unwrap_or(1) as usize) as u64
    }

    /// Of the last ones, mostly: those have a history that goes on.
    fn some_recent(&mut self) -> u64 {
        let newest = self.recorder.lock().published.keys().next_back().copied();
        let newest = newest.unwrap_or(1);
        match self.dice.is_lucky(0.8) {
            true => newest.saturating_sub(self.dice.below(40) as u64).max(1),
            false => self.some_offset(),
        }
    }

    async fn delete(&mut self) {
        let offset = self.some_recent();
        let rest = format!("/messages/{offset}");
        let (asked, status, answer) = self.insist(Method::DELETE, &rest, None).await;
        if is_there(status, &answer) {
            self.note(asked, Act::Deleted(offset));
        }
    }

    async fn reject(&mut self) {
        let (offset, reason) = (self.some_recent(), format!("person {}", self.acts));
        let rest = format!("/messages/{offset}/reject");
        let body = json!({"reason": reason});
        let (asked, status, answer) = self.insist(Method::POST, &rest, Some(&body)).await;
        if is_there(status, &answer) {
            self.note(asked, Act::Rejected { offset, reason });
        }
    }

    async fn expire(&mut self) {
        let (body, whose) = match self.dice.is_lucky(0.3) {
            true => {
                let name = format!("worker-{}", self.dice.below(WORKERS as usize));
                (json!({"consumer": name}), Whose::Consumer(name))
            }
            false => {
                let count = 1 + self.dice.below(6);
                let offsets: Vec<u64> = (0..count).map(|_| self.some_recent()).collect();
                (json!({"offsets": offsets}), Whose::Offsets(offsets))
            }
        };
        let (asked, _) = self
            .ok(Method::POST, "/in-flight/expire", Some(&body))
            .await;
        self.note(asked, Act::Expired(whose));
    }

    async fn seek(&mut self) {
        let to = match self.dice.below(10) {
            0 => json!("earliest"),
            1 => json!("latest"),
            _ => json!({"offset": self.some_recent()}),
        };
        let body = json!({"to": to, "expected_generation": self.generation});
        self.renew("/seek", &body).await;
    }

    async fn purge(&mut self) {
        let body = json!({"expected_generation": self.generation});
        self.renew("/purge", &body).await;
    }

    async fn renew(&mut self, rest: &str, body: &Value) {
        let (asked, answer) = self.ok(Method::POST, rest, Some(body)).await;
        let generation = answer["generation"].as_u64().unwrap();
        assert_eq!(generation, self.generation + 1, "{answer}");
        self.generation = generation;
        let through = answer["through_offset"].as_u64().unwrap();
        self.note(
            asked,
            Act::Renewed {
                generation,
                through,
            },
        );
    }

    async fn pause(&mut self) {
        let (asked, _) = self.ok(Method::POST, "/pause", None).await;
        self.note(asked, Act::Paused(true));
        let pause = 100 + self.dice.below(300) as u64;
        tokio::time::sleep(Duration::from_millis(pause)).await;
        let (asked, _) = self.ok(Method::POST, "/resume", None).await;
        self.note(asked, Act::Paused(false));
    }

    /// The ids of dead letters, those on their way back aside.
    async fn letters(&self) -> Vec<String> {
        let (_, page) = self.ok(Method::GET, "/dead-letters?limit=1000", None).await;
        let letters = page["dead_letters"].as_array().unwrap().iter();
        let letters = letters.filter(|letter| letter["redrive_id"].is_null());
        letters
            .map(|letter| letter["id"].as_str().unwrap().to_owned())
            .collect()
    }

    async fn some_letters(&mut self, count: usize) -> Vec<String> {
        let mut letters = self.letters().await;
        let mut some = Vec::new();
        while some.len() < count && !letters.is_empty() {
            some.push(letters.swap_remove(self.dice.below(letters.len())));
        }
        some
    }

    async fn remove_letter(&mut self) {
        if let Some(id) = self.some_letters(1).await.pop() {
            self.remove(&id).await;
        }
    }

    async fn remove(&mut self, id: &str) {
        let rest = format!("/dead-letters/{id}");
        let (asked, status, answer) = self.insist(Method::DELETE, &rest, None).await;
        // Brought back since it was listed.
        if status == StatusCode::CONFLICT {
            return;
        }
        assert_eq!(status, StatusCode::NO_CONTENT, "{id}: {answer}");
        let (generation, offset) = id.split_once('-').unwrap();
        self.note(
            asked,
            Act::LetterRemoved {
                generation: generation.parse().unwrap(),
                offset: offset.parse().unwrap(),
            },
        );
    }

    async fn redrive(&mut self) {
        if self.running.len() >= REDRIVES_MAX {
            return self.finish().await;
        }
        let mut redrive = Redrive {
            id: format!("r{}", self.acts),
            offsets: None,
            key: None,
            cause: None,
            is_dry: self.dice.is_lucky(0.15),
            status: String::new(),
            redriven: 0,
            created_at: None,
        };
        let mut body = json!({"redrive_id": redrive.id, "dry_run": redrive.is_dry});
        match self.dice.below(5) {
            0 => {
                let ids = self.some_letters(4).await;
                if ids.is_empty() {
                    return;
                }
                let offsets = ids
                    .iter()
                    .map(|id| id.split_once('-').unwrap().1.parse().unwrap());
                redrive.offsets = Some(offsets.collect::<BTreeSet<u64>>());
                body["ids"] = json!(ids);
            }
            1 => {
                let key = format!("k{}", self.dice.below(super::KEYS));
                body["filter"] = json!({"key": key});
                redrive.key = Some(key);
            }
            2 => {
                let cause = ["rejected", "out_of_attempts"][self.dice.below(2)];
                body["filter"] = json!({"cause": cause});
                redrive.cause = Some(cause.to_owned());
            }
            _ => {}
        }
        if self.dice.is_lucky(0.5) {
            body["rate_per_second"] = json!(5 + self.dice.below(40));
        }
        let (asked, answer) = self.ok(Method::POST, "/redrives", Some(&body)).await;
        if redrive.is_dry {
            return assert_eq!(answer["dry_run"], true, "{answer}");
        }
        redrive.created_at = Some(time(&answer["created_at"]));
        self.running.push((asked, redrive));
    }

    async fn cancel(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let place = self.dice.below(self.running.len());
        let rest = format!("/redrives/{}", self.running[place].1.id);
        self.ok(Method::DELETE, &rest, None).await;
        let (_, found) = self.ok(Method::GET, &rest, None).await;
        assert_ne!(found["status"], "running", "{found}");
    }

    async fn declare(&mut self) {
        if self.declarations.is_empty() {
            return self.look().await;
        }
        let place = self.dice.below(self.declarations.len());
        let (declaration, order) = self.declarations[place].clone();
        let (asked, _) = self.ok(Method::PUT, "", Some(&declaration)).await;
        self.note(asked, Act::Ordered(order));
    }

    /// Reads, which change nothing.
    async fn look(&mut self) {
        let offset = self.some_offset();
        let (_, found) = self
            .ok(Method::GET, &format!("/messages/{offset}"), None)
            .await;
        assert_eq!(found["offset"], offset, "{found}");
        self.ok(Method::GET, "/in-flight?max_messages=1000", None)
            .await;
        self.ok(Method::GET, "/messages?key=k1&max_messages=5", None)
            .await;
        let (_, queue) = self.ok(Method::GET, "", None).await;
        assert_eq!(queue["generation"], self.generation, "{queue}");
    }
}
