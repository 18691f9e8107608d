//! What a broker's database was seen to commit of its queues, by triggers of the test's own: every row of the journal, and every
//! change of a dead letter. The journal is folded and letters are removed; here all of it stays.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Utc};
use postroad::domain::queue::{End, Record, SettledAs, decode};
use serde_json::Value;
use sqlx::{Connection as _, PgConnection};

use crate::history::{Death, Journaled, Seen};

const TRIGGERS: &str = r#"
create schema audit;
create table audit.journal (number bigserial primary key, queue_id bigint, generation bigint, entries bytea);
create table audit.letter (number bigserial primary key, queue_id bigint, "offset" bigint, old jsonb, new jsonb);
create function audit.see_journal() returns trigger language plpgsql as $$
begin
    insert into audit.journal (queue_id, generation, entries) values (new.queue_id, new.generation, new.entries);
    return null;
end $$;
create function audit.see_letter() returns trigger language plpgsql as $$
begin
    if tg_op = 'DELETE' then
        insert into audit.letter (queue_id, "offset", old) values (old.queue_id, old."offset", to_jsonb(old));
    elsif tg_op = 'INSERT' then
        insert into audit.letter (queue_id, "offset", new) values (new.queue_id, new."offset", to_jsonb(new));
    else
        insert into audit.letter (queue_id, "offset", old, new)
        values (new.queue_id, new."offset", to_jsonb(old), to_jsonb(new));
    end if;
    return null;
end $$;
create trigger audit after insert on postroad_broker.queue_journal for each row execute function audit.see_journal();
create trigger audit after insert or update or delete on postroad_broker.dead_letter
    for each row execute function audit.see_letter();
"#;

/// Sets the triggers in a database that has Postroad's schemas, before its queues are used.
pub async fn install(url: &str) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::raw_sql(TRIGGERS)
        .execute(&mut connection)
        .await
        .unwrap();
    connection.close().await.unwrap();
}

/// What was journaled of a queue, in the order of the commits: generations and entries.
async fn rows(connection: &mut PgConnection, queue: &str) -> Vec<(i64, Vec<u8>)> {
    sqlx::query_as(
        "select j.generation, j.entries from audit.journal j join postroad_broker.queue q on q.id = j.queue_id
         where q.name = $1 order by j.number",
    )
    .bind(queue)
    .fetch_all(connection)
    .await
    .unwrap()
}

/// The messages of a queue that were journaled as acknowledged, also as dead letters, which removes those; by generation and offset.
pub async fn acked(connection: &mut PgConnection, queue: &str) -> BTreeSet<(u64, u64)> {
    let mut acked = BTreeSet::new();
    for (generation, entries) in rows(connection, queue).await {
        for record in decode(&entries).unwrap() {
            let ranges = match record {
                Record::Settled {
                    kind: SettledAs::Acked,
                    ranges,
                } => ranges,
                Record::LetterRemoved { offset } => vec![(offset, offset)],
                _ => continue,
            };
            let offsets = ranges
                .into_iter()
                .flat_map(|(from, through)| from..=through);
            let of_this = |offset: i64| (generation.unsigned_abs(), offset.unsigned_abs());
            acked.extend(offsets.map(of_this));
        }
    }
    acked
}

/// The deliveries of a queue that were journaled, in the order of the commits.
pub async fn journaled(connection: &mut PgConnection, queue: &str) -> Vec<Journaled> {
    let rows = rows(connection, queue).await;
    let mut journaled: Vec<Journaled> = Vec::new();
    let mut last: BTreeMap<(i64, i64), usize> = BTreeMap::new();
    let mut batch = 0;
    for (generation, entries) in rows {
        for record in decode(&entries).unwrap() {
            match record {
                Record::Delivered { first, again, .. } => {
                    batch += 1;
                    let first = first.iter().flat_map(|&(from, through)| from..=through);
                    let all = first.map(|offset| (offset, 1)).chain(again);
                    for (offset, delivery) in all {
                        last.insert((generation, offset), journaled.len());
                        journaled.push(Journaled {
                            generation: generation.unsigned_abs(),
                            offset: offset.unsigned_abs(),
                            delivery: u64::from(delivery),
                            batch,
                            is_unwritten: false,
                            is_released: false,
                        });
                    }
                }
                Record::Ended { offset, end, .. } => {
                    if let Some(&place) = last.get(&(generation, offset)) {
                        journaled[place].is_unwritten |= end == End::Unwritten;
                        journaled[place].is_released |= end == End::Released;
                    }
                }
                _ => {}
            }
        }
    }
    journaled
}

fn time(value: &Value) -> DateTime<Utc> {
    let text = value.as_str().unwrap();
    DateTime::parse_from_rfc3339(text).unwrap().to_utc()
}

fn death(row: &Value) -> Death {
    let number = |name: &str| row[name].as_u64().unwrap();
    let failures = row["failures"].as_array().unwrap().iter();
    let failures = failures.map(|failure| {
        let reason = failure["reason"].as_str().unwrap().to_owned();
        (time(&failure["at"]), reason)
    });
    Death {
        generation: number("generation"),
        delivery: number("delivery"),
        attempts: number("attempts"),
        cause: row["cause"].as_str().unwrap().to_owned(),
        failures: failures.collect(),
        died_at: time(&row["died_at"]),
    }
}

/// What was seen of a queue's dead letters, by message, in the order of the commits.
pub async fn letters(connection: &mut PgConnection, queue: &str) -> BTreeMap<u64, Vec<Seen>> {
    let rows: Vec<(i64, Option<String>, Option<String>)> = sqlx::query_as(
        "select l.\"offset\", l.old::text, l.new::text from audit.letter l
         join postroad_broker.queue q on q.id = l.queue_id where q.name = $1 order by l.number",
    )
    .bind(queue)
    .fetch_all(connection)
    .await
    .unwrap();
    let mut letters: BTreeMap<u64, Vec<Seen>> = BTreeMap::new();
    for (offset, old, new) in rows {
        let read = |text: Option<String>| text.map(|text| serde_json::from_str::<Value>(&text));
        let (old, new) = (
            read(old).transpose().unwrap(),
            read(new).transpose().unwrap(),
        );
        let seen = letters.entry(offset.unsigned_abs()).or_default();
        let Some(new) = new else {
            seen.push(Seen::Removed);
            continue;
        };
        let is_changed = |name: &str| old.as_ref().is_none_or(|old| old[name] != new[name]);
        if is_changed("died_at") || is_changed("delivery") || is_changed("generation") {
            seen.push(Seen::Died(death(&new)));
        }
        let is_marked = new["redriven_at"].is_string();
        if is_changed("redriven_at") && is_marked {
            let id = new["redrive_id"].as_str().unwrap().to_owned();
            let at = time(&new["redriven_at"]);
            seen.push(Seen::Redriven { id, at });
        } else if is_changed("redriven_at")
            && old.is_some()
            && !matches!(seen.last(), Some(Seen::Died(_)))
        {
            seen.push(Seen::Unmarked);
        }
    }
    letters
}
