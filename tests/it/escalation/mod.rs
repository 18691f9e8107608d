//! Nobody's code runs as another. A role with no right but to create in `public` plants operators, functions and types there, and the
//! database has its sessions look into `public` first; whatever of it is called notes down who called it.

mod mapped;

use serde_json::json;
use sqlx::{AssertSqlSafe, Executor as _, PgConnection};

use crate::support::{self, TestDatabase};

/// Sessions to come look into `public` before Postgres' own schema, and `low` may create there. Everything that it plants notes its caller.
pub const LOW: &str = "
    do $$ begin create role low login; exception when duplicate_object or unique_violation then null; end $$;
    grant create, usage on schema public to low;
    do $$ begin execute format('alter database %I set search_path = public, pg_catalog', current_database()); end $$;
    create table public.ran (who text not null, what text not null);
    grant insert, select on public.ran to public;
    create function public.note(what text) returns boolean language plpgsql set search_path = pg_catalog, pg_temp as $$ begin
        insert into public.ran values (current_user, what);
        return true;
    end $$";

/// Copies of all operators and functions of Postgres' own over these types, and domains by their names.
const PLANT: &str = r#"
    set session authorization low;
    set search_path = pg_catalog, pg_temp;
    do $plant$
    declare
        types constant regtype[] := '{bigint,integer,smallint,text,name,boolean,timestamptz,interval,uuid,jsonb,xid8,pg_snapshot,numeric,double precision,bytea,regclass}';
        planted record;
        n integer := 0;
    begin
        for planted in
            select o.oprname as name, o.oprleft::regtype as l, o.oprright::regtype as r, o.oprresult::regtype as result
            from pg_operator o
            where o.oprnamespace = 'pg_catalog'::regnamespace and o.oprleft = any (types) and o.oprright = any (types)
                and o.oprresult = any (types)
        loop
            n := n + 1;
            execute format(
                'create function public.planted_%s(l %s, r %s) returns %s language plpgsql set search_path = pg_catalog, pg_temp as '
                '$f$ begin perform public.note(%L); return l operator(pg_catalog.%s) r; end $f$',
                n, planted.l, planted.r, planted.result, 'operator ' || planted.name, planted.name);
            execute format(
                'create operator public.%s (leftarg = %s, rightarg = %s, function = public.planted_%s)',
                planted.name, planted.l, planted.r, n);
        end loop;
        -- Those that no operator of Postgres' own fits as well: these are taken though Postgres' own come first.
        create function public.planted_modulo(l bigint, r integer) returns bigint language plpgsql
            set search_path = pg_catalog, pg_temp as
            $f$ begin perform public.note('operator % of another'); return l % r::bigint; end $f$;
        create operator public.% (leftarg = bigint, rightarg = integer, function = public.planted_modulo);
        for planted in
            select p.proname as name, pg_get_function_identity_arguments(p.oid) as arguments, p.prorettype::regtype as result,
                (select string_agg('$' || i, ', ') from generate_series(1, p.pronargs) i) as given
            from pg_proc p
            where p.pronamespace = 'pg_catalog'::regnamespace and p.prokind = 'f' and not p.proretset and p.provariadic = 0
                and p.proargnames is null and p.pronargs between 0 and 3 and p.prorettype = any (types)
                and p.proargtypes::oid[] <@ types::oid[] and p.proname !~ '^(pg_stat|pg_terminate|pg_sleep|pg_reload|pg_rotate|pg_advisory)'
        loop
            execute format(
                'create or replace function public.%I(%s) returns %s language plpgsql set search_path = pg_catalog, pg_temp as '
                '$f$ begin perform public.note(%L); return pg_catalog.%I(%s); end $f$',
                planted.name, planted.arguments, planted.result, 'function ' || planted.name, planted.name, planted.given);
        end loop;
        foreach planted.name in array array['uuid', 'jsonb', 'timestamptz', 'xid8', 'pg_snapshot', 'text', 'bytea', 'interval', 'regclass', 'oid'] loop
            execute format('create domain public.%1$I as pg_catalog.%1$I check (public.note(%2$L))', planted.name, 'type ' || planted.name);
        end loop;
    end
    $plant$;
    reset session authorization"#;

/// Plants all that.
pub async fn plant(database: &TestDatabase) {
    let mut owner = database.connect().await;
    owner.execute(LOW).await.unwrap();
    owner.execute(PLANT).await.unwrap();
    // It is called by who does not look to his path.
    let mut careless = database.connect().await;
    let calling = "select 5::bigint % 3::integer, 'a'::text || 'b'::text, length('abc'::pg_catalog.text), now()";
    careless.execute(calling).await.unwrap();
    assert!(ran(&mut owner).await.len() >= 4, "the plant is called");
    owner.execute("truncate public.ran").await.unwrap();
}

/// Who called what of it.
pub async fn ran(connection: &mut PgConnection) -> Vec<String> {
    sqlx::query_scalar(
        "select distinct pg_catalog.format('%s as %s', what, who) from public.ran where who operator(pg_catalog.<>) 'low'",
    )
    .fetch_all(connection)
    .await
    .unwrap()
}

#[tokio::test]
async fn nothing_that_is_planted_in_another_schema_runs_in_the_broker() {
    let database = support::empty_database().await;
    plant(&database).await;
    let broker = postroad::app::Broker::start(support::broker::config(&database.url))
        .await
        .unwrap();
    let http = support::Http::new(broker.url());
    http.declare("/v1/queues/q", &json!({"topics": ["a.>"]}))
        .await;
    http.declare(
        "/v1/streams/keyed",
        &json!({"topics": ["k.>"], "keyed": true}),
    )
    .await;
    for topic in ["a.b", "k.b"] {
        let message = json!({"specversion": "1.0", "id": topic, "source": "/s", "type": "t", "partitionkey": "k"});
        let path = format!("/v1/topics/{topic}/messages");
        let (status, answer) = http.post(&path, &message).await;
        assert!(status.is_success(), "{answer}");
    }
    let mut producer = database.connect().await;
    producer
        .execute("set search_path = pg_catalog, pg_temp")
        .await
        .unwrap();
    for text in [
        "insert into postroad.outbox (topic, payload) values ('a.c', '{}')",
        "select postroad.publish('a.d', '{}', key => 'k', deliver_at => clock_timestamp() + interval '2 seconds')",
    ] {
        producer.execute(text).await.unwrap();
    }
    let mut settled = 0;
    while settled < 3 {
        let batch = http
            .ok(
                "/v1/queues/q/receive",
                &json!({"max_messages": 10, "wait_seconds": 5}),
            )
            .await;
        let deliveries = batch["deliveries"].as_array().unwrap();
        let receipts: Vec<_> = deliveries
            .iter()
            .map(|delivery| json!({"receipt": delivery["receipt"]}))
            .collect();
        settled += receipts.len();
        if !receipts.is_empty() {
            http.ok("/v1/queues/q/ack", &json!({"deliveries": receipts}))
                .await;
        }
    }
    let (status, lock) = http
        .put("/v1/locks/l", &json!({"owner": "me", "ttl_seconds": 30}))
        .await;
    assert!(status.is_success(), "{lock}");
    broker.stop().await.unwrap();
    let mut owner = database.connect().await;
    assert_eq!(ran(&mut owner).await, Vec::<String>::new());
}

#[tokio::test]
async fn nothing_that_is_planted_in_another_schema_runs_in_a_producer_or_in_an_install() {
    let database = support::empty_database().await;
    plant(&database).await;
    // The printed scripts are run by whoever may, in psql.
    let mut owner = database.connect().await;
    for script in [
        postroad::store::migrate::origin_sql(),
        postroad::store::migrate::inbox_sql(),
        postroad::store::migrate::fence_sql(),
    ] {
        for _ in 0..2 {
            owner.execute(AssertSqlSafe(script.clone())).await.unwrap();
        }
    }
    assert_eq!(ran(&mut owner).await, Vec::<String>::new());
    for text in [
        "insert into postroad.outbox (topic, payload, key, headers, type, deliver_at) values ('a', 'x', 'k', '{\"a\": 1}', 't', '2030-01-01')",
        "insert into postroad.outbox (topic, payload, key, expected_version) values ('a', 'x', 'k', 1)",
        "select postroad.publish(topic => 'a', payload => 'x', key => 'k', headers => '{\"a\": 1}', order_lock => true)",
        "select postroad.publish('a', '1'::pg_catalog.jsonb)",
        "select postroad.publish('a', '1'::pg_catalog.json)",
        "select postroad.publish('a', '1'::pg_catalog.bytea)",
        "select postroad.inbox_accept('q', '/s', 'i', 1)",
        "select postroad.inbox_maintain()",
        "select postroad.inbox_forget('q')",
        "select postroad.assert_fence('l', 1)",
        "select postroad.relay_restamp()",
    ] {
        let mut session = database.connect().await;
        session.execute(text).await.unwrap();
        assert_eq!(ran(&mut owner).await, Vec::<String>::new(), "{text}");
    }
    // Nor does the library's insert.
    let mut producer = database.connect().await;
    let mut transaction = sqlx::Connection::begin(&mut producer).await.unwrap();
    let message = postroad::outbox::Message::text("a", "x", "text/plain")
        .key("k")
        .header("a", 1);
    postroad::outbox::publish(&mut transaction, &message)
        .await
        .unwrap();
    postroad::outbox::lock_key(&mut transaction, "k")
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(ran(&mut owner).await, Vec::<String>::new());
}
