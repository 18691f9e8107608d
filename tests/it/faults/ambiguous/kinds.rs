//! The kinds of writes, and what each must answer and leave behind.

use chrono::{SubsecRound as _, TimeDelta, Utc};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use super::{Cut, Mark, Rig, bigint, integer};
use crate::support::consumer::{items, publish_ids};
use crate::support::{self, Http};

/// The queues' journal is written with the names of their leases.
const JOURNAL: &[u8] = b"slot/";

/// A kind of write.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    Publish,
    PublishTogether,
    Receive,
    Ack,
    Nack,
    Extend,
    Release,
    Reject,
    DeclareStream,
    DeleteStream,
    DeclareQueue,
    ChangeQueue,
    DeleteQueue,
    Seek,
    Purge,
    Pause,
    DeclareTopic,
    DeleteTopic,
    DeclareSchedule,
    DeleteSchedule,
    Schedule,
    CancelScheduled,
    AcquireLock,
    ReleaseLock,
    Redrive,
    CancelRedrive,
    DeleteLetter,
    DeleteMessage,
    RejectMessage,
    Expire,
    Relay,
    Resend,
    MarkResent,
}

pub(super) const KINDS: [Kind; 33] = [
    Kind::Publish,
    Kind::PublishTogether,
    Kind::Receive,
    Kind::Ack,
    Kind::Nack,
    Kind::Extend,
    Kind::Release,
    Kind::Reject,
    Kind::DeclareStream,
    Kind::DeleteStream,
    Kind::DeclareQueue,
    Kind::ChangeQueue,
    Kind::DeleteQueue,
    Kind::Seek,
    Kind::Purge,
    Kind::Pause,
    Kind::DeclareTopic,
    Kind::DeleteTopic,
    Kind::DeclareSchedule,
    Kind::DeleteSchedule,
    Kind::Schedule,
    Kind::CancelScheduled,
    Kind::AcquireLock,
    Kind::ReleaseLock,
    Kind::Redrive,
    Kind::CancelRedrive,
    Kind::DeleteLetter,
    Kind::DeleteMessage,
    Kind::RejectMessage,
    Kind::Expire,
    Kind::Relay,
    Kind::Resend,
    Kind::MarkResent,
];

/// What the kinds need to be there.
pub(super) async fn prepare(http: &Http) {
    for queue in ["back", "paused"] {
        let path = format!("/v1/queues/{queue}");
        http.declare(&path, &json!({"topics": ["back.*"]})).await;
    }
    let schema = json!({"schema": {"type": "object", "properties": {"n": {"type": "integer"}}}});
    http.declare("/v1/topics/strict.one", &schema).await;
}

fn at(text: impl AsRef<[u8]>) -> Mark {
    Mark {
        bytes: vec![text.as_ref().to_vec()],
        cut: Cut::Statement,
        passes: 0,
    }
}

fn at_commit(text: impl AsRef<[u8]>) -> Mark {
    Mark {
        cut: Cut::Commit,
        ..at(text)
    }
}

/// At what the queues' journal is told of something.
fn at_journal_of(text: &str) -> Mark {
    let mut mark = at(JOURNAL);
    mark.bytes.push(text.as_bytes().to_vec());
    mark
}

fn ok(answer: (StatusCode, Value)) -> Value {
    assert!(answer.0.is_success(), "{answer:?}");
    answer.1
}

fn put(path: &str) -> (Method, &str) {
    (Method::PUT, path)
}

fn post(path: &str) -> (Method, &str) {
    (Method::POST, path)
}

fn delete(path: &str) -> (Method, &str) {
    (Method::DELETE, path)
}

/// A delete that is found out says so, and only then the thing is not there.
fn assert_deleted(first: &(StatusCode, Value), again: &(StatusCode, Value)) {
    assert_eq!(first.0, StatusCode::NO_CONTENT, "{first:?}");
    assert_eq!(again.0, StatusCode::NOT_FOUND, "{again:?}");
}

impl Kind {
    pub(super) async fn run(self, rig: &mut Rig) {
        let n = rig.number;
        match self {
            Self::Publish => publish(rig, &["other.zero"]).await,
            Self::PublishTogether => publish(rig, &["other.one", "other.two"]).await,
            Self::Receive => receive(rig).await,
            Self::Ack => settle(rig, "ack", json!({}), ["acked", "already_settled"]).await,
            Self::Nack => settle(rig, "nack", json!({"delay_seconds": 3600}), ["nacked"; 2]).await,
            Self::Extend => {
                let more = json!({"visibility_timeout_seconds": 7200});
                settle(rig, "extend", more, ["extended"; 2]).await;
            }
            Self::Release => {
                let later = json!({"delay_seconds": 3600});
                settle(rig, "release", later, ["released"; 2]).await;
            }
            Self::Reject => {
                let why = json!({"reason": "test"});
                settle(rig, "reject", why, ["rejected", "dead_lettered"]).await;
            }
            Self::DeclareStream | Self::DeleteStream => stream(rig, self, n).await,
            Self::DeclareQueue | Self::ChangeQueue | Self::DeleteQueue => queue(rig, self, n).await,
            Self::Seek => renew(rig, "seek", json!({"to": {"offset": 1}})).await,
            Self::Purge => renew(rig, "purge", json!({})).await,
            Self::Pause => pause(rig).await,
            Self::DeclareTopic | Self::DeleteTopic => topic(rig, self, n).await,
            Self::DeclareSchedule | Self::DeleteSchedule => schedule(rig, self, n).await,
            Self::Schedule | Self::CancelScheduled => scheduled(rig, self, n).await,
            Self::AcquireLock | Self::ReleaseLock => lock(rig, self, n).await,
            Self::Redrive | Self::DeleteLetter => letter(rig, self, n).await,
            Self::CancelRedrive => cancel_redrive(rig, n).await,
            Self::DeleteMessage | Self::RejectMessage => message(rig, self).await,
            Self::Expire => expire(rig).await,
            Self::Relay => relay(rig).await,
            Self::Resend | Self::MarkResent => resend(rig, self, n).await,
        }
    }
}

async fn publish(rig: &mut Rig, topics: &[&str]) {
    let mut messages = Vec::new();
    let mut last = String::new();
    for (place, topic) in topics.iter().enumerate() {
        last = rig.next_id(&format!("published-{place}"));
        let event = json!({"specversion": "1.0", "id": last, "source": "/test", "type": "t", "data": {"id": last}});
        messages.push(json!({"topic": topic, "event": event}));
    }
    let body = json!({ "messages": messages });
    let path = post("/v1/messages");
    let first = ok(rig.cut(at(&last), path.clone(), Some(&body)).await);
    let again = ok(rig.again(path, Some(&body)).await);
    for (first, again) in first["messages"]
        .as_array()
        .unwrap()
        .iter()
        .zip(again["messages"].as_array().unwrap())
    {
        assert_eq!(first["offset"], again["offset"]);
        assert_eq!(again["duplicate"], true);
        assert!(rig.was_unknown || first["duplicate"] == false, "{first}");
    }
}

async fn receive(rig: &mut Rig) {
    let id = rig.next_id("received");
    publish_ids(&rig.http, "work.done", &[id]).await;
    let receive_id = format!("receive-{:05}", rig.number);
    let body =
        json!({"receive_id": receive_id, "wait_seconds": 10, "visibility_timeout_seconds": 3600});
    let path = post("/v1/queues/work/receive");
    let first = ok(rig.cut(at(&receive_id), path.clone(), Some(&body)).await);
    let again = ok(rig.again(path, Some(&body)).await);
    let (first, again) = (&first["deliveries"], &again["deliveries"]);
    assert_eq!(first.as_array().unwrap().len(), 1, "{first}");
    assert_eq!(first[0]["receipt"], again[0]["receipt"]);
    assert_eq!(first[0]["delivery"], 1);
}

async fn settle(rig: &mut Rig, verb: &str, members: Value, results: [&str; 2]) {
    let taken = rig.take_one().await;
    let body = json!({"deliveries": items(&[taken], &members)});
    let path = format!("/v1/queues/work/{verb}");
    let first = ok(rig.cut(at(JOURNAL), post(&path), Some(&body)).await);
    let again = ok(rig.again(post(&path), Some(&body)).await);
    let (first, again) = (&first["deliveries"][0], &again["deliveries"][0]);
    assert_eq!([&first["result"], &again["result"]], results, "{verb}");
    assert_eq!(first["due_at"], again["due_at"], "{verb}");
}

async fn stream(rig: &mut Rig, kind: Kind, n: usize) {
    let (name, pattern) = (format!("s{n:05}"), format!("s{n:05}.>"));
    let path = format!("/v1/streams/{name}");
    let body = json!({"topics": [pattern]});
    if matches!(kind, Kind::DeclareStream) {
        ok(rig.cut(at_commit(&pattern), put(&path), Some(&body)).await);
        let (status, again) = rig.again(put(&path), Some(&body)).await;
        assert_eq!(status, StatusCode::OK, "{again}");
        assert_eq!(again["topics"], json!([pattern]));
        let rows = format!("select count(*) from postroad_broker.stream where name = '{name}'");
        assert_eq!(rig.count(&rows).await, 1);
        rig.http.delete(&path).await;
        return;
    }
    rig.http.declare(&path, &body).await;
    let id = format!("select id::bigint from postroad_broker.stream where name = '{name}'");
    let id = i32::try_from(rig.count(&id).await).unwrap();
    let first = rig.cut(at_commit(integer(id)), delete(&path), None).await;
    assert_deleted(&first, &rig.again(delete(&path), None).await);
}

async fn queue(rig: &mut Rig, kind: Kind, n: usize) {
    let name = format!("queue-{n:05}");
    let path = format!("/v1/queues/{name}");
    let letters = format!("letters.{n:05}");
    let pattern = format!("queues.{n:05}");
    let plain = json!({"topics": [pattern]});
    let changed = json!({"topics": [pattern], "dead_letter_topic": letters});
    if matches!(kind, Kind::DeclareQueue) {
        let (status, first) = rig.cut(at(&pattern), put(&path), Some(&plain)).await;
        assert!(status == StatusCode::CREATED || rig.was_unknown, "{first}");
        let (status, again) = rig.again(put(&path), Some(&plain)).await;
        assert_eq!(status, StatusCode::OK, "{again}");
        assert_eq!(first["start_offset"], again["start_offset"]);
        assert_eq!(first["created_at"], again["created_at"]);
    } else {
        rig.http.declare(&path, &plain).await;
    }
    if matches!(kind, Kind::ChangeQueue) {
        let first = ok(rig.cut(at(&letters), put(&path), Some(&changed)).await);
        let again = ok(rig.again(put(&path), Some(&changed)).await);
        assert_eq!(first["dead_letter_topic"], letters);
        assert_eq!(again["dead_letter_topic"], letters);
    }
    let id =
        format!("select coalesce(max(id), 0) from postroad_broker.queue where name = '{name}'");
    let id = rig.count(&id).await;
    if matches!(kind, Kind::DeleteQueue) {
        let first = rig.cut(at(bigint(id)), delete(&path), None).await;
        assert_deleted(&first, &rig.again(delete(&path), None).await);
    } else {
        assert_eq!(rig.http.delete(&path).await.0, StatusCode::NO_CONTENT);
    }
    let former = format!("select count(*) from postroad_broker.former_queue where id = {id}");
    assert_eq!(rig.count(&former).await, 1);
}

async fn renew(rig: &mut Rig, act: &str, mut body: Value) {
    let id = rig.next_id("back");
    publish_ids(&rig.http, "back.one", &[id]).await;
    let (_, before) = rig.http.get("/v1/queues/back").await;
    body["expected_generation"] = before["generation"].clone();
    let path = format!("/v1/queues/back/{act}");
    let marker = at("from_generation");
    let first = ok(rig.cut(marker, post(&path), Some(&body)).await);
    let again = ok(rig.again(post(&path), Some(&body)).await);
    assert_eq!(first, again);
    let next = before["generation"].as_i64().unwrap() + 1;
    assert_eq!(first["generation"], next);
    let (_, after) = rig.http.get("/v1/queues/back").await;
    assert_eq!(after["generation"], next);
}

async fn pause(rig: &mut Rig) {
    let id = "select id from postroad_broker.queue where name = 'paused'";
    let id = rig.count(id).await;
    for (act, is_paused) in [("pause", true), ("resume", false)] {
        let path = format!("/v1/queues/paused/{act}");
        let first = ok(rig.cut(at(bigint(id)), post(&path), None).await);
        assert_eq!(first["paused"], is_paused);
        assert_eq!(ok(rig.again(post(&path), None).await), first);
        let (_, queue) = rig.http.get("/v1/queues/paused").await;
        assert_eq!(queue["paused"], is_paused);
    }
}

async fn topic(rig: &mut Rig, kind: Kind, n: usize) {
    let pattern = format!("topics.t{n:05}");
    let path = format!("/v1/topics/{pattern}");
    let body = json!({"max_bytes": 4096});
    if matches!(kind, Kind::DeclareTopic) {
        ok(rig.cut(at_commit(&pattern), put(&path), Some(&body)).await);
        let (status, again) = rig.again(put(&path), Some(&body)).await;
        assert_eq!(status, StatusCode::OK, "{again}");
        assert_eq!(again["max_bytes"], 4096);
        rig.http.delete(&path).await;
        return;
    }
    rig.http.declare(&path, &body).await;
    let first = rig.cut(at_commit(&pattern), delete(&path), None).await;
    assert_deleted(&first, &rig.again(delete(&path), None).await);
}

async fn schedule(rig: &mut Rig, kind: Kind, n: usize) {
    let name = format!("schedule-{n:05}");
    let path = format!("/v1/schedules/{name}");
    let body = json!({"topic": "ticks", "cron": "0 0 1 1 *"});
    if matches!(kind, Kind::DeclareSchedule) {
        ok(rig.cut(at(&name), put(&path), Some(&body)).await);
        let (status, again) = rig.again(put(&path), Some(&body)).await;
        assert_eq!(status, StatusCode::OK, "{again}");
        rig.http.delete(&path).await;
        return;
    }
    rig.http.declare(&path, &body).await;
    let first = rig.cut(at(&name), delete(&path), None).await;
    assert_deleted(&first, &rig.again(delete(&path), None).await);
}

async fn scheduled(rig: &mut Rig, kind: Kind, n: usize) {
    // Whole seconds of its own, so that it is known by its time.
    let due = Utc::now().trunc_subsecs(0) + TimeDelta::seconds(36_000 + n as i64);
    let id = format!("scheduled-{n:05}");
    let event = json!({"specversion": "1.0", "id": id, "source": "/test", "type": "t",
        "deliverat": due.to_rfc3339()});
    let body = json!({"messages": [{"topic": "later.one", "event": event}]});
    let path = post("/v1/messages");
    let first = match kind {
        Kind::Schedule => rig.cut(at(&id), path.clone(), Some(&body)).await,
        _ => rig.again(path.clone(), Some(&body)).await,
    };
    let first = ok(first)["messages"][0]["scheduled"].clone();
    let again = ok(rig.again(path, Some(&body)).await);
    assert_eq!(first, again["messages"][0]["scheduled"]);
    let path = format!("/v1/scheduled-messages/{}", first["id"].as_str().unwrap());
    if matches!(kind, Kind::CancelScheduled) {
        let epoch = chrono::DateTime::parse_from_rfc3339("2000-01-01T00:00:00Z").unwrap();
        let micros = (due.fixed_offset() - epoch).num_microseconds().unwrap();
        let first = rig.cut(at(bigint(micros)), delete(&path), None).await;
        assert!(first.0.is_success(), "{first:?}");
        assert_eq!(rig.again(delete(&path), None).await, first);
    } else {
        assert!(rig.http.delete(&path).await.0.is_success());
    }
    let (_, found) = rig.http.get(&path).await;
    assert_eq!(found["status"], "cancelled");
}

async fn lock(rig: &mut Rig, kind: Kind, n: usize) {
    let name = format!("lock-{n:05}");
    let path = format!("/v1/locks/{name}");
    let body = json!({"owner": "a", "ttl_seconds": 600});
    let first = match kind {
        Kind::AcquireLock => rig.cut(at(&name), put(&path), Some(&body)).await,
        _ => rig.again(put(&path), Some(&body)).await,
    };
    let token = ok(first)["token"].clone();
    assert_eq!(ok(rig.again(put(&path), Some(&body)).await)["token"], token);
    let release = format!("{path}?token={token}");
    if matches!(kind, Kind::ReleaseLock) {
        let first = rig.cut(at(&name), delete(&release), None).await;
        assert!(first.0.is_success(), "{first:?}");
        assert_eq!(rig.again(delete(&release), None).await, first);
    } else {
        assert!(rig.http.delete(&release).await.0.is_success());
    }
    let other = ok(rig.again(put(&path), Some(&json!({"owner": "b"}))).await);
    assert!(other["token"].as_i64() > token.as_i64());
}

async fn letter(rig: &mut Rig, kind: Kind, n: usize) {
    let taken = rig.take_one().await;
    let reject = items(&[taken], &json!({"reason": "test"}));
    let dead = rig.queue.settle_all("reject", &reject, "rejected").await;
    let letter = dead[0]["dead_letter"].as_str().unwrap().to_owned();
    let path = format!("/v1/queues/work/dead-letters/{letter}");
    if matches!(kind, Kind::DeleteLetter) {
        let first = rig.cut(at(JOURNAL), delete(&path), None).await;
        assert_eq!(first.0, StatusCode::NO_CONTENT, "{first:?}");
        assert_eq!(rig.again(delete(&path), None).await, first);
        assert_eq!(rig.http.get(&path).await.0, StatusCode::NOT_FOUND);
        return;
    }
    let id = format!("redrive-{n:05}");
    let body = json!({"redrive_id": id, "ids": [letter]});
    let begin = post("/v1/queues/work/redrives");
    let first = ok(rig.cut(at(JOURNAL), begin.clone(), Some(&body)).await);
    let again = ok(rig.again(begin, Some(&body)).await);
    assert_eq!((&first["id"], &again["id"]), (&json!(id), &json!(id)));
    assert_eq!(first["created_at"], again["created_at"]);
    let back = rig.queue.take(1, 3_600).await;
    let acks = items(&back, &json!({}));
    rig.queue.settle_all("ack", &acks, "acked").await;
    let redriven = format!("/v1/queues/work/redrives/{id}");
    let redriven = support::eventually("the redrive's end", || async {
        let (_, redrive) = rig.http.get(&redriven).await;
        (redrive["status"] == "done").then_some(redrive)
    })
    .await;
    assert_eq!(redriven["redriven"], 1);
}

/// Of several letters the first ones are back when it is cancelled.
async fn cancel_redrive(rig: &mut Rig, n: usize) {
    const LETTERS: usize = 5;
    let mut taken = Vec::new();
    for place in 0..LETTERS {
        let id = rig.next_id(&format!("letter-{place}"));
        publish_ids(&rig.http, "work.done", &[id]).await;
        taken.extend(rig.queue.take(1, 3_600).await);
    }
    let reject = items(&taken, &json!({"reason": "test"}));
    let dead = rig.queue.settle_all("reject", &reject, "rejected").await;
    let letters: Vec<&str> = dead
        .iter()
        .map(|dead| dead["dead_letter"].as_str().unwrap())
        .collect();
    let id = format!("cancelled-{n:05}");
    let begin = json!({"redrive_id": id, "ids": letters, "rate_per_second": 1});
    rig.http.ok("/v1/queues/work/redrives", &begin).await;
    let path = format!("/v1/queues/work/redrives/{id}");
    let first = rig.cut(at_journal_of(&id), delete(&path), None).await;
    assert_eq!(first.0, StatusCode::NO_CONTENT, "{first:?}");
    assert_eq!(rig.again(delete(&path), None).await, first);
    let (_, redrive) = rig.http.get(&path).await;
    assert_eq!(redrive["status"], "cancelled", "{redrive}");
    let back = redrive["redriven"].as_u64().unwrap() as usize;
    assert!(back < LETTERS, "{redrive}");
    let came = rig.queue.take(back, 3_600).await;
    let acks = items(&came, &json!({}));
    rig.queue.settle_all("ack", &acks, "acked").await;
    let mut left = 0;
    for letter in letters {
        let path = format!("/v1/queues/work/dead-letters/{letter}");
        let (status, found) = rig.http.get(&path).await;
        if status == StatusCode::OK && found["redrive_id"].is_null() {
            left += 1;
            assert!(rig.http.delete(&path).await.0.is_success());
        }
    }
    assert_eq!(back + left, LETTERS, "each is back, or a letter");
}

async fn message(rig: &mut Rig, kind: Kind) {
    let taken = rig.take_one().await;
    let offset = taken["offset"].clone();
    let path = format!("/v1/queues/work/messages/{offset}");
    let acks = items(&[taken], &json!({}));
    if matches!(kind, Kind::DeleteMessage) {
        let first = rig.cut(at(JOURNAL), delete(&path), None).await;
        assert!(first.0.is_success(), "{first:?}");
        rig.queue.settle_all("ack", &acks, "already_settled").await;
        return;
    }
    let body = json!({"reason": "test"});
    let path = format!("{path}/reject");
    let first = ok(rig.cut(at(JOURNAL), post(&path), Some(&body)).await);
    let again = ok(rig.again(post(&path), Some(&body)).await);
    assert_eq!(again["result"], "dead_lettered", "{again}");
    assert!(first["result"] == "rejected" || rig.was_unknown, "{first}");
    let path = format!("/v1/queues/work/dead-letters/1-{offset}");
    assert_eq!(rig.http.get(&path).await.0, StatusCode::OK);
    assert!(rig.http.delete(&path).await.0.is_success());
}

async fn expire(rig: &mut Rig) {
    let taken = rig.take_one().await;
    let path = "/v1/queues/work/in-flight/expire";
    let body = json!({"offsets": [taken["offset"]]});
    let first = ok(rig.cut(at(JOURNAL), post(path), Some(&body)).await);
    assert!(
        first["offsets"] == json!([taken["offset"]]) || rig.was_unknown,
        "{first}"
    );
    let again = ok(rig.again(post(path), Some(&body)).await);
    assert_eq!(again["expired"], 0, "it is not live any more");
    let back = rig.queue.take(1, 3_600).await;
    assert_eq!(
        (&back[0]["offset"], &back[0]["attempt"]),
        (&taken["offset"], &json!(2))
    );
    let acks = items(&back, &json!({}));
    rig.queue.settle_all("ack", &acks, "acked").await;
}

/// Nobody asks for it and nobody repeats it but the relay.
async fn relay(rig: &mut Rig) {
    let id = rig.next_id("relayed");
    rig.snare.arm(at(&id), rig.action);
    let row = "insert into postroad.outbox (topic, payload, id) values ('other.three', '{}', $1)";
    let inserting = sqlx::query(row).bind(&id).execute(&mut rig.direct);
    inserting.await.unwrap();
    let rows = format!("select count(*) from postroad_broker.message where id = '{id}'");
    let began = std::time::Instant::now();
    while !rig.snare.has_sprung() || rig.count(&rows).await != 1 {
        assert!(began.elapsed().as_secs() < 60, "{id} was not relayed");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

async fn resend(rig: &mut Rig, kind: Kind, n: usize) {
    let id = rig.next_id("resent");
    let row = "insert into postroad.outbox (topic, payload, id) values ('strict.one', '{\"n\": \"x\"}', $1)";
    sqlx::query(row)
        .bind(&id)
        .execute(&mut rig.direct)
        .await
        .unwrap();
    let rejected = support::eventually("the row to be rejected", || async {
        let (_, list) = rig
            .http
            .get("/v1/origins/local/rejected?max_rows=1000")
            .await;
        let rows = list["rejected"].as_array()?;
        rows.iter()
            .find(|row| row["row"]["id"] == json!(id))
            .cloned()
    })
    .await;
    let number = rejected["id"].as_i64().unwrap();
    let mark = match kind {
        // After the look at the row, which has the same parameters.
        Kind::MarkResent => Mark {
            passes: 1,
            ..at(bigint(number))
        },
        _ => at(&id),
    };
    let path = format!("/v1/origins/local/rejected/{number}/resend");
    let body = json!({"skip_schema": true});
    let first = ok(rig.cut(mark, post(&path), Some(&body)).await);
    let (status, again) = rig.again(post(&path), Some(&body)).await;
    assert_eq!(status, StatusCode::CONFLICT, "{n}: {again}");
    assert!(first["offset"].is_u64(), "{first}");
    let marked = format!(
        "select count(*) from postroad_broker.rejected_message where id = {number} and resent_at is not null"
    );
    assert_eq!(rig.count(&marked).await, 1);
}
