//! Planted faults that are another text of a function of the database. What `POSTROAD_MUTANT` names is in the databases that tests
//! get; in the code that is released there is nothing of it.

use postroad::store::Database;
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

/// A fault: in this function the text in the second place stands instead of the first.
const TEXTS: &[(&str, &str, &str, &str)] = &[
    (
        "no-epoch-check",
        "write_queue_group",
        "and l.epoch = s.epoch and l.holder = holder_incarnation",
        "",
    ),
    (
        "no-epoch-check",
        "write_queue_journal",
        "and l.epoch = of_epoch and l.holder = of_holder",
        "",
    ),
    (
        "no-epoch-check",
        "append",
        "coalesce(l.epoch = u.epoch and l.holder = p_incarnation, false)",
        "true",
    ),
    (
        "no-epoch-check",
        "append_next",
        "and l.epoch = r_epoch and l.holder = p_incarnation",
        "",
    ),
    (
        "epoch-read-without-lock",
        "write_queue_group",
        "order by l.name for no key update",
        "order by l.name",
    ),
    (
        "epoch-read-without-lock",
        "write_queue_journal",
        "l.holder = of_holder for no key update",
        "l.holder = of_holder",
    ),
    (
        "epoch-read-without-lock",
        "append",
        "order by l.name for no key update",
        "order by l.name",
    ),
    (
        "epoch-read-without-lock",
        "append_next",
        "l.holder = p_incarnation for no key update",
        "l.holder = p_incarnation",
    ),
    (
        "offset-from-empty-log",
        "append",
        "greatest(v_top, v_floor) + 1",
        "coalesce(v_top, 0) + 1",
    ),
    // The quick append never looks at the log: it is out of the way.
    (
        "offset-from-empty-log",
        "append_next",
        "if v_floor is null or",
        "if true or",
    ),
    ("now-for-clock", "take_leases", "clock_timestamp()", "now()"),
    (
        "now-for-clock",
        "register_node",
        "clock_timestamp()",
        "now()",
    ),
];

/// Plants what the environment asks for.
///
/// # Panics
/// If a function has not the text that is to be replaced.
pub async fn plant(database: &Database) {
    let Ok(mutant) = std::env::var("POSTROAD_MUTANT") else {
        return;
    };
    let mut connection = database.connect().await.unwrap();
    let texts = TEXTS.iter().filter(|(name, ..)| *name == mutant);
    for (_, function, text, planted) in texts {
        let found: String = sqlx::query_scalar(
            "select pg_get_functiondef(p.oid) from pg_proc p join pg_namespace n on n.oid = p.pronamespace
             where n.nspname = 'postroad_broker' and p.proname = $1",
        )
        .bind(function)
        .fetch_one(&mut connection)
        .await
        .unwrap();
        assert!(found.contains(text), "{function} has no `{text}`");
        let replaced = found.replace(text, planted);
        sqlx::raw_sql(AssertSqlSafe(replaced))
            .execute(&mut connection)
            .await
            .unwrap();
    }
    connection.close().await.unwrap();
}
