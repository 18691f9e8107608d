//! Rows that cannot become messages do not stop the rows behind them, and can be sent on.

use postroad::domain::name::{OriginName, Topic};
use postroad::relay::{Correction, RejectedError};

use super::{Origin, execute, read_log, rig};
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
