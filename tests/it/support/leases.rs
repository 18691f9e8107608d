//! What a broker's database was seen to commit of its leases, and of the writes under them: triggers of the test's own. Both hold
//! the lease's row until they commit, so their numbers have the order of the commits.

use sqlx::{Connection as _, PgConnection};

use crate::history::Time;
use crate::history::owners::Event;

const TRIGGERS: &str = r#"
create schema history;
create table history.event (
    number bigserial primary key, at timestamptz not null default clock_timestamp(),
    lease text, epoch bigint, holder bigint, is_write boolean);
create function history.see_lease() returns trigger language plpgsql as $$
begin
    insert into history.event (lease, epoch, holder, is_write) values (new.name, new.epoch, new.holder, false);
    return null;
end $$;
create function history.see_journal() returns trigger language plpgsql as $$
begin
    insert into history.event (lease, epoch, is_write)
    values ('slot/' || lpad(new.slot::text, 2, '0'), new.epoch, true);
    return null;
end $$;
create function history.see_relay() returns trigger language plpgsql as $$
begin
    insert into history.event (lease, epoch, is_write) values ('relay/' || new.origin_id, new.epoch, true);
    return null;
end $$;
create trigger history after insert on postroad_broker.relay_journal for each row execute function history.see_relay();
create trigger history after insert or update on postroad_broker.lease for each row execute function history.see_lease();
create trigger history after insert on postroad_broker.queue_journal for each row execute function history.see_journal();
"#;

/// Sets the triggers in a database that has the schemas.
pub async fn watch(url: &str) {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::raw_sql(TRIGGERS)
        .execute(&mut connection)
        .await
        .unwrap();
}

/// All that was seen, in the order of the commits.
pub async fn events(url: &str) -> Vec<Event> {
    let mut connection = PgConnection::connect(url).await.unwrap();
    let rows: Vec<(Time, String, i64, Option<i64>, bool)> = sqlx::query_as(
        "select at, lease, epoch, holder, is_write from history.event order by number",
    )
    .fetch_all(&mut connection)
    .await
    .unwrap();
    let rows = rows.into_iter();
    rows.map(|(at, lease, epoch, holder, is_write)| Event {
        at,
        lease,
        epoch,
        holder,
        is_write,
    })
    .collect()
}
