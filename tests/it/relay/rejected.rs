//! Rows that cannot become messages do not stop the rows behind them, and can be sent on.

use std::time::Duration;

use postroad::domain::name::{OriginName, Topic};
use postroad::relay::{self, Correction, RejectedError, State};
use postroad::store::relay::RejectedBounds;

use super::{Origin, execute, read_log, rig, rig_with};
use crate::support;

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_cannot_become_a_message_is_listed_and_can_be_sent_on() {
    let broker = support::database().await;
    let origin = Origin::install(&broker.url).await;
    let rig = rig(&broker.database, &[("local", None)]).await;
    let mut owner = origin.owner().await;
    execute(
        &mut owner,
        "alter table postroad.outbox drop constraint outbox_row_is_valid;
        insert into postroad.outbox (topic, payload, id) values ('a', '{\"version\": 1}', 'one'), ('b..c', '{\"version\": 2}', 'two'), ('c', '{\"version\": 3}', 'three')",
    )
    .await;
    let status = rig.caught_up("local").await;
    assert_eq!(status.rejected_count, 1);
    let ids = |log: &[super::Logged]| log.iter().map(|m| m.id.clone()).collect::<Vec<_>>();
    assert_eq!(ids(&read_log(&broker.url).await), ["one", "three"]);
    let local = OriginName::local();
    let page = rig.relay.rejected(&local, 0, 10).await.unwrap();
    assert_eq!(page.next_after, None);
    let [row] = &page.rows[..] else {
        panic!("{page:?}");
    };
    assert!(
        row.reason.contains("the topic has the token ``"),
        "{}",
        row.reason
    );
    let uncorrected = rig
        .relay
        .resend_rejected(&local, row.id, Correction::default());
    assert!(matches!(
        uncorrected.await,
        Err(RejectedError::StillInvalid { .. })
    ));
    let correction = Correction {
        topic: Some(Topic::parse("b.c").unwrap()),
        ..Correction::default()
    };
    let placed = rig
        .relay
        .resend_rejected(&local, row.id, correction.clone())
        .await
        .unwrap();
    assert_eq!(placed.offset.0, 3);
    assert!(matches!(
        rig.relay.resend_rejected(&local, row.id, correction).await,
        Err(RejectedError::AlreadyResent { .. })
    ));
    assert_eq!(ids(&read_log(&broker.url).await), ["one", "three", "two"]);
    rig.stop().await;
}

/// A list that nobody looks after does not grow for ever, and whoever has looked at rows deletes them.
#[tokio::test(flavor = "multi_thread")]
async fn rejected_rows_leave_when_they_are_deleted_or_beyond_the_bounds() {
    let broker = support::database().await;
    let origin = Origin::install(&broker.url).await;
    let mut owner = origin.owner().await;
    execute(
        &mut owner,
        "alter table postroad.outbox drop constraint outbox_row_is_valid;
        insert into postroad.outbox (topic, payload, id) select 'b..c', repeat('x', 100), n::text from generate_series(1, 2500) as n",
    )
    .await;
    let local = OriginName::local();
    let first = rig(&broker.database, &[("local", None)]).await;
    first.caught_up("local").await;
    assert_eq!(first.status("local").rejected_count, 2_500);
    let ids = async |rig: &super::Rig| {
        let page = rig.relay.rejected(&local, 0, 1_000).await.unwrap();
        page.rows.iter().map(|row| row.id).collect::<Vec<_>>()
    };
    let before = ids(&first).await;
    let one = before[1]..=before[1];
    assert_eq!(
        first
            .relay
            .delete_rejected(&local, one.clone())
            .await
            .unwrap(),
        1
    );
    assert_eq!(first.relay.delete_rejected(&local, one).await.unwrap(), 0);
    assert_eq!(
        first
            .relay
            .delete_rejected(&local, 0..=before[9])
            .await
            .unwrap(),
        9
    );
    assert_eq!(ids(&first).await[0], before[10]);
    first.stop().await;
    for (bounds, left) in [
        (
            RejectedBounds {
                rows: 2_000,
                bytes: 1 << 30,
                age: Duration::from_secs(3_600),
            },
            2_000,
        ),
        (
            RejectedBounds {
                rows: 2_000,
                bytes: 100_000,
                age: Duration::from_secs(3_600),
            },
            0,
        ),
        (
            RejectedBounds {
                rows: 2_000,
                bytes: 1 << 30,
                age: Duration::ZERO,
            },
            0,
        ),
    ] {
        let options = relay::Options {
            rejected: bounds,
            ..relay::Options::default()
        };
        let fits = |count: u64| {
            if left > 0 {
                count == left
            } else {
                count < 1_000
            }
        };
        let bounded = rig_with(&broker.database, &[("local", None)], options).await;
        bounded
            .until("local", "the list to be bounded", |status| {
                status.state == State::Running && fits(status.rejected_count)
            })
            .await;
        bounded.stop().await;
    }
    // A re-relay finds what is listed by an index.
    let plan: Vec<(String,)> = sqlx::query_as(
        "explain select from postroad_broker.rejected_message
        where origin_id = 1 and seq = 1 and hashtextextended(outbox_row, 0) = 5 and outbox_row = 'x'",
    )
    .fetch_all(&mut owner)
    .await
    .unwrap();
    assert!(
        plan.iter()
            .any(|(line,)| line.contains("rejected_message_by_row")),
        "{plan:?}"
    );
}
