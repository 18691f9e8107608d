//! What is seen of schedules and of what waits when they cannot go on, and what a topic asks of occurrences.

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use serde_json::{Value, json};

use crate::support::consumer::time;
use crate::support::{self, Http, TestBroker};

/// Waits until what is at a path is as asked, and gives it.
async fn until(http: &Http, path: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    support::eventually(what, || async {
        let (_, found) = http.get(path).await;
        is_so(&found).then_some(found)
    })
    .await
}

async fn metric(http: &Http, name: &str) -> f64 {
    let (_, text) = http.get("/metrics").await;
    let lines = text.as_str().unwrap().lines();
    let value = lines.filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let values: Vec<f64> = value.map(|value| value.parse().unwrap()).collect();
    assert_eq!(values.len(), 1, "{name}");
    values[0]
}

#[tokio::test(flavor = "multi_thread")]
async fn an_occurrence_that_its_topic_does_not_take_is_left_out_and_says_why() {
    let mut broker = support::broker().await;
    let http = &broker.http;
    let path = "/v1/schedules/tick";
    let tick = json!({"topic": "ticks", "cron": "* * * * * *", "misfire": "all", "event": {"data": {"n": 12}}});
    let declared = http.declare(path, &tick).await;
    assert_eq!(
        (
            &declared["state"],
            &declared["last_failure"],
            &declared["failed_count"]
        ),
        (&json!("active"), &Value::Null, &json!(0))
    );
    until(http, path, "an occurrence", |tick| {
        tick["published_count"] != 0
    })
    .await;

    http.declare(
        "/v1/topics/ticks",
        &json!({"schema": {"type": "object", "required": ["kind"]}}),
    )
    .await;
    let failing = until(http, path, "occurrences to fail", |tick| {
        tick["failed_count"].as_u64().unwrap() >= 2
    })
    .await;
    assert_eq!(failing["state"], "failing", "{failing}");
    let failure = &failing["last_failure"];
    let reason = failure["reason"].as_str().unwrap();
    assert!(reason.contains("schema of `ticks`"), "{reason}");
    assert!(time(&failure["occurrence_at"]) > time(&failing["last_at"]));
    assert!(time(&failure["at"]) >= time(&failure["occurrence_at"]));
    assert!(
        !failing["next_at"].as_array().unwrap().is_empty(),
        "it goes on"
    );
    let (_, page) = http
        .get("/v1/streams/main/messages?max_messages=1000")
        .await;
    let messages = page["messages"].as_array().unwrap();
    assert_eq!(
        messages.len() as u64,
        failing["published_count"].as_u64().unwrap()
    );
    support::eventually("the metric", || async {
        (metric(http, "postroad_schedules_failing").await > 0.0).then_some(())
    })
    .await;
    assert!(metric(http, "postroad_schedule_occurrences_failed_total").await >= 2.0);

    // Too large, by the topic's own bound.
    http.declare("/v1/topics/ticks", &json!({"max_bytes": 7}))
        .await;
    until(http, path, "another reason", |tick| {
        let reason = tick["last_failure"]["reason"].as_str().unwrap();
        reason == "the payload is 8 bytes long, at most 7 are allowed"
    })
    .await;
    let (status, refused) = http.put(path, &tick).await;
    assert_eq!(
        (status.as_u16(), &refused["errors"][0]["pointer"]),
        (422, &json!("/event/data"))
    );

    let before = until(http, path, "the schedule", |_| true).await;
    assert!(http.delete("/v1/topics/ticks").await.0.is_success());
    let after = until(http, path, "occurrences again", |tick| {
        tick["state"] == "active"
            && tick["published_count"].as_u64() > before["published_count"].as_u64()
    })
    .await;
    assert_eq!(
        after["last_failure"]["reason"],
        "the payload is 8 bytes long, at most 7 are allowed"
    );
    support::eventually("the metric", || async {
        (metric(http, "postroad_schedules_failing").await == 0.0).then_some(())
    })
    .await;
    // Each second since the first is there or was counted as failed.
    let paused = json!({"topic": "ticks", "cron": "* * * * * *", "misfire": "all", "event": {"data": {"n": 12}}, "paused": true});
    http.declare(path, &paused).await;
    let end = until(http, path, "the pause", |tick| tick["state"] == "paused").await;
    let count = end["published_count"].as_u64().unwrap() as usize;
    let times = support::eventually("all that was published", || async {
        let (_, page) = http
            .get("/v1/streams/main/messages?max_messages=1000")
            .await;
        let messages = page["messages"].as_array().unwrap();
        let times = messages
            .iter()
            .map(|message| time(&message["event"]["time"]));
        let times: Vec<DateTime<Utc>> = times.collect();
        (times.len() == count).then_some(times)
    })
    .await;
    let seconds = (times[count - 1] - times[0]).num_seconds() + 1;
    assert_eq!(
        seconds,
        (count as u64 + end["failed_count"].as_u64().unwrap()) as i64
    );
    broker.stop().await;
}

async fn publish_in(broker: &TestBroker, topic: &str, milliseconds: i64) -> String {
    let at = Utc::now() + TimeDelta::milliseconds(milliseconds);
    let at = at.to_rfc3339_opts(SecondsFormat::Micros, true);
    let event = json!({"specversion": "1.0", "deliverat": at, "data": 1});
    let item = json!({"messages": [{"topic": topic, "event": event}]});
    let placed = broker.http.ok("/v1/messages", &item).await;
    assert!(placed["messages"][0]["scheduled"].is_object(), "{placed}");
    at
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_and_held_up_shows_in_the_stream_and_the_metrics() {
    let mut broker = support::broker().await;
    let http = &broker.http;
    let path = "/v1/streams/main";
    let (_, main) = http.get(path).await;
    assert_eq!(main["scheduled"], Value::Null);
    let hour = publish_in(&broker, "later", 3_600_000).await;
    let (_, main) = http.get(path).await;
    assert_eq!(
        main["scheduled"],
        json!({"next_due_at": hour, "lag_seconds": 0.0, "waiting": 1})
    );
    http.declare(
        "/v1/schedules/tick",
        &json!({"topic": "ticks", "cron": "* * * * * *"}),
    )
    .await;
    until(http, "/v1/schedules/tick", "an occurrence", |tick| {
        tick["published_count"] != 0
    })
    .await;
    let second = publish_in(&broker, "later", 1_000).await;
    support::eventually("the metric", || async {
        let (_, text) = http.get("/metrics").await;
        let text = text.as_str().unwrap();
        text.contains("postroad_scheduled_messages{stream=\"main\"}")
            .then_some(())
    })
    .await;

    // Whoever publishes needs the head.
    let mut holder = broker.database.connect().await;
    crate::relay::execute(
        &mut holder,
        "begin; select from postroad_broker.stream_head for no key update",
    )
    .await;
    let held = until(http, path, "the lag", |main| {
        main["scheduled"]["lag_seconds"].as_f64().unwrap() > 0.3
    })
    .await;
    assert!(time(&held["scheduled"]["next_due_at"]) <= time(&json!(second)));
    until(http, "/v1/schedules/tick", "the schedule's lag", |tick| {
        tick["lag_seconds"].as_f64().unwrap() > 0.3
    })
    .await;
    support::eventually("the metrics", || async {
        let schedule = metric(http, "postroad_schedule_lag_seconds").await;
        let stream = metric(http, "postroad_scheduled_lag_seconds{stream=\"main\"}").await;
        (schedule > 0.3 || stream > 0.3).then_some(())
    })
    .await;
    crate::relay::execute(&mut holder, "commit").await;
    until(http, path, "the lag to end", |main| {
        main["scheduled"]["next_due_at"] == json!(hour)
    })
    .await;
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_or_a_schedule_that_the_database_refuses_is_in_no_others_way() {
    let mut broker = support::broker().await;
    let http = &broker.http;
    // The one that is refused comes first.
    http.declare("/v1/streams/other", &json!({"topics": ["other"]}))
        .await;
    let mut owner = broker.database.connect().await;
    crate::relay::execute(
        &mut owner,
        "create function refuse() returns trigger language plpgsql as $$ begin
            if new.stream_id = (select s.id from postroad_broker.stream s where s.name = 'main') then raise exception 'not today'; end if;
            return new; end $$;
        create trigger refuse before insert on postroad_broker.message for each row execute function refuse();
        create function refuse_tick() returns trigger language plpgsql as $$ begin
            if new.source = '/postroad/schedules/refused' then raise exception 'not this one'; end if; return new; end $$;
        create trigger refuse before insert on postroad_broker.scheduled_message for each row execute function refuse_tick()",
    )
    .await;
    let tick = |topic: &str| json!({"topic": topic, "cron": "* * * * * *", "misfire": "all"});
    http.declare("/v1/schedules/refused", &tick("other")).await;
    http.declare("/v1/schedules/taken", &tick("other")).await;
    publish_in(&broker, "later", 500).await;
    publish_in(&broker, "other", 500).await;
    let is_there = |other: &Value| other["last_offset"].as_i64().unwrap() >= 3;
    until(http, "/v1/streams/other", "what is not refused", is_there).await;
    let is_late = |main: &Value| main["scheduled"]["lag_seconds"].as_f64().unwrap() > 0.2;
    let main = until(http, "/v1/streams/main", "the lag", is_late).await;
    assert_eq!(main["last_offset"], 0);
    let refused = until(http, "/v1/schedules/refused", "the reason", |refused| {
        refused["state"] == "failing"
    })
    .await;
    let reason = refused["last_failure"]["reason"].as_str().unwrap();
    assert!(
        reason.contains("the database refuses the message") && reason.contains("not this one"),
        "{reason}"
    );
    assert_eq!(
        (&refused["failed_count"], &refused["published_count"]),
        (&json!(0), &json!(0))
    );

    // Once nothing is in the way, nothing was left out.
    crate::relay::execute(
        &mut owner,
        "drop function refuse() cascade; drop function refuse_tick() cascade",
    )
    .await;
    let active = until(
        http,
        "/v1/schedules/refused",
        "the occurrences",
        |refused| refused["state"] == "active",
    )
    .await;
    assert!(active["published_count"].as_u64().unwrap() > 1, "{active}");
    until(http, "/v1/streams/main", "the message", |main| {
        main["last_offset"] == 1
    })
    .await;
    broker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_that_cannot_be_read_is_in_no_others_way_and_counts_as_failing() {
    let mut broker = support::broker().await;
    let http = &broker.http;
    let tick = json!({"topic": "ticks", "cron": "* * * * * *"});
    for name in ["one", "two"] {
        http.declare(&format!("/v1/schedules/{name}"), &tick).await;
    }
    // As a version would find it whose database of zones has lost one.
    crate::relay::execute(
        &mut broker.database.connect().await,
        "update postroad_broker.schedule set declaration = replace(declaration, 'UTC', 'Mars/Phobos'), revision = revision + 1
            where name = 'one'",
    )
    .await;
    support::eventually("the metric", || async {
        (metric(http, "postroad_schedules_failing").await == 1.0).then_some(())
    })
    .await;
    let (_, listed) = http.get("/v1/schedules").await;
    assert_eq!(listed["schedules"].as_array().unwrap().len(), 1);
    assert_eq!(http.get("/v1/schedules/one").await.0.as_u16(), 500);
    let before = listed["schedules"][0]["published_count"].as_u64().unwrap();
    until(http, "/v1/schedules/two", "another occurrence", |two| {
        two["published_count"].as_u64().unwrap() > before
    })
    .await;
    http.declare("/v1/schedules/one", &tick).await;
    let is_active = |one: &Value| one["state"] == "active" && one["published_count"] != 0;
    until(http, "/v1/schedules/one", "it to go on", is_active).await;
    broker.stop().await;
}
