//! Outboxes that are already there: Debezium's table as its documentation has it, picked up by snapshot and by deletion, and one
//! with numbers and columns of its own. What the relay promises for its own outbox is tested of them by the same producers.

mod failover;
mod faults;
mod layout;
mod race;
mod travel;
mod wrong;

use std::collections::HashSet;

use postroad::domain::mapping::{Draft, Mapping};
use postroad::domain::name::OriginName;
use postroad::relay::{self, OriginOptions};
use postroad::store::Database;
use postroad::store::mapped::install;
use sqlx::PgConnection;

use super::shop::{self, Layout};
use super::{Logged, Origin, Rig, SHOP_ROLES, Verdict, connect, execute, judge, read_log, rig_of};

/// A mapped table and how it is picked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    DebeziumSnapshot,
    DebeziumDelete,
    NumberedDelete,
}

impl Kind {
    pub const ALL: [Self; 3] = [
        Self::DebeziumSnapshot,
        Self::DebeziumDelete,
        Self::NumberedDelete,
    ];

    /// The name of the origin in the tests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::DebeziumSnapshot => "debezium-snapshot",
            Self::DebeziumDelete => "debezium-delete",
            Self::NumberedDelete => "numbered-delete",
        }
    }

    /// Debezium's columns, from the chapter on its outbox event router. By deletion, a primary key besides.
    const fn table(self) -> &'static str {
        match self {
            Self::DebeziumSnapshot => {
                "create table outboxevent (
                    id uuid not null,
                    aggregatetype character varying(255) not null,
                    aggregateid character varying(255) not null,
                    type character varying(255) not null,
                    payload jsonb
                );
                grant select, insert on outboxevent to shop_producer"
            }
            Self::DebeziumDelete => {
                "create table outboxevent (
                    id uuid not null primary key,
                    aggregatetype character varying(255) not null,
                    aggregateid character varying(255) not null,
                    type character varying(255) not null,
                    payload jsonb
                );
                grant select, insert on outboxevent to shop_producer"
            }
            Self::NumberedDelete => {
                "create schema shop;
                create table shop.events (
                    n bigint generated always as identity primary key,
                    event_id uuid not null default gen_random_uuid(),
                    kind text not null,
                    sku text,
                    body json,
                    trace varchar(200),
                    meta jsonb,
                    created_at timestamp default (now() at time zone 'UTC')
                );
                grant usage on schema shop to shop_producer;
                grant select, insert on shop.events to shop_producer"
            }
        }
    }

    pub const fn table_name(self) -> &'static str {
        match self {
            Self::NumberedDelete => "shop.events",
            _ => "outboxevent",
        }
    }

    /// As a person configures it.
    pub fn draft(self) -> Draft {
        let text = |text: &str| Some(text.to_owned());
        match self {
            Self::DebeziumSnapshot | Self::DebeziumDelete => Draft {
                layout: text("debezium"),
                pickup: text(if self == Self::DebeziumDelete {
                    "delete"
                } else {
                    "snapshot"
                }),
                ..Draft::default()
            },
            Self::NumberedDelete => Draft {
                table: text("shop.events"),
                pickup: text("delete"),
                columns: [
                    ("topic", "orders.{kind}"),
                    ("id", "{event_id}"),
                    ("seq", "{n}"),
                    ("key", "{sku}"),
                    ("payload", "{body}"),
                    ("headers", "{meta}"),
                    ("time", "{created_at}"),
                    ("source", "/shop"),
                ]
                .map(|(field, value)| (field.to_owned(), value.to_owned()))
                .into(),
                extensions: [("traceparent".to_owned(), "{trace}".to_owned())].into(),
                ..Draft::default()
            },
        }
    }

    pub fn mapping(self) -> Mapping {
        self.draft().finish(&origin_name(self.name())).unwrap()
    }

    const fn layout(self) -> Layout {
        match self {
            Self::NumberedDelete => Layout::Numbered,
            _ => Layout::Debezium,
        }
    }

    /// Rows of random ids come in their order: none. The others keep the order of each key.
    pub fn keeps_order(self) -> bool {
        self != Self::DebeziumDelete
    }

    /// The table in a database, installed, with a user of each role.
    pub async fn install(self, url: &str) -> Origin {
        let mut owner = connect(url).await;
        create_roles(&mut owner).await;
        execute(&mut owner, self.table()).await;
        let database = Database::new(url, 2).unwrap();
        for _ in 0..2 {
            install::install(&database, &self.mapping()).await.unwrap();
        }
        database.close().await;
        Origin {
            url: url.to_owned(),
            layout: self.layout(),
        }
    }
}

/// The roles of a cluster, with a user of each.
pub async fn create_roles(owner: &mut PgConnection) {
    execute(
        owner,
        "do $$ declare kind text; begin
            foreach kind in array array['relay', 'producer'] loop
                begin
                    execute format('create role %I', 'postroad_' || kind || '_' || current_database());
                exception when duplicate_object or unique_violation then null;
                end;
            end loop;
        end $$",
    )
    .await;
    execute(owner, SHOP_ROLES).await;
}

fn origin_name(name: &str) -> OriginName {
    OriginName::parse(name).unwrap()
}

pub fn options(kind: Kind, url: &str) -> OriginOptions {
    OriginOptions {
        name: origin_name(kind.name()),
        url: Some(url.to_owned()),
        mapping: Some(kind.mapping()),
    }
}

/// A rig with one mapped origin.
pub async fn rig_mapped(db: &Database, kind: Kind, url: &str) -> Rig {
    let origins = vec![options(kind, url)];
    let options = relay::Options::default();
    rig_of(db, relay::Options { origins, ..options }).await
}

/// Exactly what committed, once, in order if the kind keeps it. Returns how many messages that was.
pub async fn assert_exact(kind: Kind, origin: &Origin, broker_url: &str) -> usize {
    let committed = shop::committed(origin).await;
    assert_is(
        kind,
        &committed,
        &HashSet::new(),
        &read_log(broker_url).await,
    );
    committed.len()
}

/// The same, where the origin has forgotten messages that the streams have.
pub fn assert_is(
    kind: Kind,
    committed: &HashSet<String>,
    forgotten: &HashSet<String>,
    log: &[Logged],
) {
    let all: HashSet<String> = committed.union(forgotten).cloned().collect();
    let verdict = judge(committed, log);
    let phantom = judge(&all, log).phantom;
    let disordered = if kind.keeps_order() {
        verdict.disordered
    } else {
        0
    };
    println!("{kind:?}: {} messages, {verdict:?}", log.len());
    let found = Verdict {
        phantom,
        disordered,
        ..verdict
    };
    assert_eq!(found, Verdict::default(), "{kind:?}");
}

/// Rows that are in the table.
pub async fn count_rows(kind: Kind, origin: &Origin) -> i64 {
    let text = format!("select count(*) from {}", kind.table_name());
    sqlx::query_scalar(sqlx::AssertSqlSafe(text))
        .fetch_one(&mut origin.owner().await)
        .await
        .unwrap()
}
