//! A consumer that does whatever consumers may do, and writes down what it was told.

use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{TimeDelta, Utc};
use postroad::domain::queue::Random;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::Http;
use super::consumer::time;
use crate::history::{Asked, Delivered, Recorder, Settled, Time, Told, Verb};

/// Deliveries that a consumer remembers; older ones it has forgotten, as one that died would.
const HELD_MAX: usize = 60;

/// Numbers of a seed.
pub struct Dice(Random);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(Random::new(seed))
    }

    /// 0 to 1.
    pub fn unit(&mut self) -> f64 {
        self.0.next_unit()
    }

    pub fn below(&mut self, end: usize) -> usize {
        ((self.unit() * end as f64) as usize).min(end.saturating_sub(1))
    }

    pub fn is_lucky(&mut self, chance: f64) -> bool {
        self.unit() < chance
    }
}

#[derive(Clone)]
struct Held {
    generation: u64,
    offset: u64,
    delivery: u64,
    receipt: String,
}

/// A receive that was not answered, and has an id: it is asked again, mostly.
struct Unanswered {
    body: Value,
    acks: Vec<Held>,
    first_at: Time,
}

pub struct Worker {
    /// The brokers that it asks in turn, as one behind a balancer does.
    pub nodes: Vec<Http>,
    pub queue: String,
    pub name: String,
    pub recorder: Arc<Recorder>,
    pub dice: Dice,
    held: Vec<Held>,
    unanswered: Option<Unanswered>,
    receives: u64,
    reasons: u64,
    last: Option<(Verb, Vec<Held>)>,
    asked: usize,
}

/// What became of a request.
enum Answer {
    Told(Value),
    /// Nobody knows whether it was carried out.
    Unknown,
    /// It never left.
    Unsent,
}

/// The generation in a receipt: it is the second of the numbers behind its version.
fn generation(receipt: &str) -> u64 {
    let bytes = URL_SAFE_NO_PAD.decode(receipt).unwrap();
    let mut numbers = bytes[1..].iter();
    let mut next = || {
        let mut number = 0;
        for (place, byte) in numbers.by_ref().enumerate() {
            number |= u64::from(byte & 0x7f) << (7 * place);
            if byte & 0x80 == 0 {
                break;
            }
        }
        number
    };
    next();
    next()
}

impl Worker {
    pub fn new(
        nodes: Vec<Http>,
        queue: &str,
        name: String,
        recorder: Arc<Recorder>,
        seed: u64,
    ) -> Self {
        Self {
            nodes,
            queue: queue.to_owned(),
            name,
            recorder,
            dice: Dice::new(seed),
            held: Vec::new(),
            unanswered: None,
            receives: 0,
            reasons: 0,
            last: None,
            asked: 0,
        }
    }

    /// One act.
    pub async fn step(&mut self) {
        match self.dice.below(100) {
            0..45 => self.receive_something().await,
            45..90 => self.settle_something().await,
            90..95 => {
                if let Some((verb, items)) = self.last.clone() {
                    self.settle(verb, items).await;
                }
            }
            _ => {
                let pause = self.dice.below(400) as u64;
                tokio::time::sleep(std::time::Duration::from_millis(pause)).await;
            }
        }
    }

    /// Takes what there is and acknowledges it.
    pub async fn drain(&mut self) {
        let before = self.held.len();
        let body = json!({"max_messages": 100, "wait_seconds": 0.5, "visibility_timeout_seconds": 2, "consumer": self.name});
        self.receive(body, Vec::new(), None).await;
        let came = self.held.split_off(before.min(self.held.len()));
        if !came.is_empty() {
            self.settle(Verb::Ack, came).await;
        }
    }

    async fn receive_something(&mut self) {
        if let Some(unanswered) = self.unanswered.take()
            && self.dice.is_lucky(0.9)
        {
            let Unanswered {
                body,
                acks,
                first_at,
            } = unanswered;
            return self.receive(body, acks, Some(first_at)).await;
        }
        self.receives += 1;
        let mut body = json!({
            "max_messages": 1 + self.dice.below(8),
            "wait_seconds": self.dice.below(4) as f64 * 0.2,
            "visibility_timeout_seconds": 1.0 + self.dice.unit(),
            "consumer": self.name,
        });
        if self.dice.is_lucky(0.6) {
            body["receive_id"] = json!(format!("{}-{}", self.name, self.receives));
        }
        let mut acks = Vec::new();
        if self.dice.is_lucky(0.3) {
            acks = self.choose();
            body["ack"] = acks
                .iter()
                .map(|held| json!({"receipt": held.receipt}))
                .collect();
        }
        self.receive(body, acks, None).await;
    }

    async fn settle_something(&mut self) {
        let items = self.choose();
        if items.is_empty() {
            return;
        }
        let verb = match self.dice.below(100) {
            0..50 => Verb::Ack,
            50..66 => Verb::Nack,
            66..80 => Verb::Extend(TimeDelta::seconds(1 + self.dice.below(2) as i64)),
            80..94 => Verb::Release,
            _ => Verb::Reject,
        };
        self.last = Some((verb, items.clone()));
        self.settle(verb, items).await;
    }

    /// A few of those that are held, or were: some are settled, some somebody else's by now. Most are forgotten then.
    fn choose(&mut self) -> Vec<Held> {
        let mut chosen: Vec<Held> = Vec::new();
        for _ in 0..=self.dice.below(4) {
            if self.held.is_empty() {
                break;
            }
            let place = self.dice.below(self.held.len());
            let held = match self.dice.is_lucky(0.7) {
                true => self.held.swap_remove(place),
                false => self.held[place].clone(),
            };
            if !chosen.iter().any(|other| other.receipt == held.receipt) {
                chosen.push(held);
            }
        }
        chosen
    }

    /// The answer, with its times.
    async fn ask(&mut self, path: &str, body: &Value) -> (Asked, Answer) {
        let http = &self.nodes[self.asked % self.nodes.len()];
        self.asked += 1;
        let at = Utc::now();
        let path = format!("/v1/queues/{}/{path}", self.queue);
        let answer = http.call(Method::POST, &path, Some(body)).await;
        let answered = Utc::now();
        let asked = Asked { at, answered };
        let answer = match answer {
            Ok((status, answer)) if status.is_success() => return (asked, Answer::Told(answer)),
            Ok((status, answer)) => {
                // As many are in flight as may be: what the answer would have said of its acks is not known.
                let may_be = [
                    StatusCode::SERVICE_UNAVAILABLE,
                    StatusCode::TOO_MANY_REQUESTS,
                ];
                assert!(may_be.contains(&status), "{path} {body}: {status} {answer}");
                Answer::Unknown
            }
            Err(error) if error.is_connect() => Answer::Unsent,
            Err(_) => Answer::Unknown,
        };
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        (asked, answer)
    }

    /// `first_at`: when the receive was asked for first, if it is a repeat.
    async fn receive(&mut self, body: Value, acks: Vec<Held>, first_at: Option<Time>) {
        let (asked, answer) = self.ask("receive", &body).await;
        let first_at = first_at.unwrap_or(asked.at);
        match &answer {
            Answer::Told(answer) => self.record(asked, Verb::Ack, &acks, &[], Some(&answer["ack"])),
            Answer::Unknown => self.record(asked, Verb::Ack, &acks, &[], None),
            Answer::Unsent => {}
        }
        let Answer::Told(answer) = answer else {
            if body.get("receive_id").is_some() {
                self.unanswered = Some(Unanswered {
                    body,
                    acks,
                    first_at,
                });
            }
            return;
        };
        for delivery in answer["deliveries"].as_array().unwrap() {
            let number = |member: &str| delivery[member].as_u64().unwrap();
            let receipt = delivery["receipt"].as_str().unwrap().to_owned();
            let delivered = Delivered {
                asked: Asked {
                    at: first_at,
                    answered: asked.answered,
                },
                generation: generation(&receipt),
                offset: number("offset"),
                delivery: number("delivery"),
                attempt: number("attempt"),
                receipt,
                visible_until: time(&delivery["visible_until"]),
                receive_id: body["receive_id"].as_str().map(str::to_owned),
                consumer: self.name.clone(),
            };
            self.held.push(Held {
                generation: delivered.generation,
                offset: delivered.offset,
                delivery: delivered.delivery,
                receipt: delivered.receipt.clone(),
            });
            self.recorder.lock().delivered.push(delivered);
        }
        if self.held.len() > HELD_MAX {
            self.held.drain(..self.held.len() - HELD_MAX);
        }
    }

    async fn settle(&mut self, verb: Verb, items: Vec<Held>) {
        let delay = self.dice.below(3) as f64 * 0.3;
        let has_reason = matches!(verb, Verb::Nack | Verb::Reject);
        let reasons: Vec<String> = items
            .iter()
            .filter(|_| has_reason)
            .map(|_| {
                self.reasons += 1;
                format!("{} {}", self.name, self.reasons)
            })
            .collect();
        let deliveries: Vec<Value> = items
            .iter()
            .enumerate()
            .map(|(place, held)| match verb {
                Verb::Ack => json!({"receipt": held.receipt}),
                Verb::Reject => json!({"receipt": held.receipt, "reason": reasons[place]}),
                Verb::Nack => {
                    json!({"receipt": held.receipt, "delay_seconds": delay, "reason": reasons[place]})
                }
                Verb::Release => json!({"receipt": held.receipt, "delay_seconds": delay}),
                Verb::Extend(by) => {
                    json!({"receipt": held.receipt, "visibility_timeout_seconds": by.num_seconds()})
                }
            })
            .collect();
        let (asked, answer) = self
            .ask(verb.path(), &json!({"deliveries": deliveries}))
            .await;
        match &answer {
            Answer::Told(answer) => self.record(asked, verb, &items, &reasons, Some(answer)),
            Answer::Unknown => self.record(asked, verb, &items, &reasons, None),
            Answer::Unsent => {}
        }
    }

    fn record(
        &self,
        asked: Asked,
        verb: Verb,
        items: &[Held],
        reasons: &[String],
        answer: Option<&Value>,
    ) {
        let mut history = self.recorder.lock();
        for (place, held) in items.iter().enumerate() {
            let told = answer.map(|answer| {
                let outcome = &answer["deliveries"][place];
                assert_eq!(outcome["receipt"], held.receipt, "{answer}");
                let moment =
                    |member: &str| outcome[member].is_string().then(|| time(&outcome[member]));
                Told {
                    result: outcome["result"].as_str().unwrap().to_owned(),
                    due_at: moment("due_at"),
                    visible_until: moment("visible_until"),
                    has_letter: outcome["dead_letter"].is_string(),
                }
            });
            history.settled.push(Settled {
                asked,
                verb,
                generation: held.generation,
                offset: held.offset,
                delivery: held.delivery,
                reason: reasons.get(place).cloned(),
                told,
            });
        }
    }
}
