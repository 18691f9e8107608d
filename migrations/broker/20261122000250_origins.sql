-- Where messages come from: the origins, how far each relay got, and the outbox rows that could not become messages.
create table postroad_broker.origin (
    id integer generated always as identity primary key,
    -- From the configuration. The name is the origin's identity: its URL may change, and is kept nowhere in here.
    name text not null unique,
    created_at timestamptz not null default clock_timestamp(),
    constraint origin_name_is_valid check (name ~ '^[A-Za-z0-9_.-]{1,100}$')
);

-- How far each relay got, folded from the journal from time to time: never updated per commit. An origin's latest position is
-- the one with the highest number in checkpoint and journal together, and its number is 0 when there is none.
create table postroad_broker.relay_checkpoint (
    origin_id integer primary key references postroad_broker.origin (id),
    number bigint not null,
    position text not null,
    constraint relay_checkpoint_number_positive check (number > 0)
);

-- The segment of the journal that is written; when, and by which transaction, it was turned to.
create table postroad_broker.relay_turn (
    singleton boolean primary key default true,
    segment smallint not null default 0,
    turned_at timestamptz not null default clock_timestamp(),
    turned_by xid8 not null default pg_current_xact_id(),
    constraint relay_turn_is_one_row check (singleton),
    constraint relay_turn_is_of_two check (segment between 0 and 1)
);
insert into postroad_broker.relay_turn default values;

create function postroad_broker.relay_segment() returns smallint
language sql stable set search_path = pg_catalog, pg_temp as $$ select t.segment from postroad_broker.relay_turn t $$;

-- One row per append of a relay, inserted by the append's own transaction. Two segments in turn, each truncated by a fold once no
-- snapshot needs it (`turn_relay_journal`). No foreign key: its check would lock the origin's row in every append.
create table postroad_broker.relay_journal (
    origin_id integer not null,
    number bigint not null,
    -- The epoch of the relay's lease, for people who read it after an incident.
    epoch bigint not null,
    -- JSON, see the relay's module of the same name.
    position text not null,
    appended_at timestamptz not null default clock_timestamp(),
    segment smallint not null default postroad_broker.relay_segment(),
    primary key (origin_id, number, segment),
    constraint relay_journal_number_positive check (number > 0)
) partition by list (segment);
create table postroad_broker.relay_journal_0 partition of postroad_broker.relay_journal for values in (0)
with (autovacuum_enabled = false);
create table postroad_broker.relay_journal_1 partition of postroad_broker.relay_journal for values in (1)
with (autovacuum_enabled = false);

-- Turns to the other segment of the journal, in the transaction that has folded this one into relay_checkpoint. Truncated is what the turn
-- before left: its rows went into the checkpoint by then, but TRUNCATE is for all, whatever their snapshots see, and a dump whose snapshot is
-- older than that turn has the checkpoint of before. So the segment stays as long as there is such a snapshot; where other users'
-- sessions are not shown, for an hour, or for 10 minutes when much has piled up. Whether it was done. Waits for no lock.
create function postroad_broker.turn_relay_journal() returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_turn postroad_broker.relay_turn;
    v_other text;
    v_has_rows boolean;
    v_age interval;
begin
    select t.* into v_turn from postroad_broker.relay_turn t for update nowait;
    v_other := 'relay_journal_' || 1 - v_turn.segment;
    execute format('select exists (select from postroad_broker.%I)', v_other) into v_has_rows;
    if v_has_rows then
        v_age := clock_timestamp() - v_turn.turned_at;
        if exists (
                select from pg_stat_activity a
                where a.datname = current_database() and a.pid <> pg_backend_pid()
                    and a.backend_type is distinct from 'autovacuum worker'
                    and (age(a.backend_xmin) >= age(v_turn.turned_by::xid) or a.query = '<insufficient privilege>')
                -- A dump of a standby, which tells its primary of it by hot_standby_feedback.
                union all
                select from pg_stat_activity a
                where a.backend_type = 'walsender' and age(a.backend_xmin) >= age(v_turn.turned_by::xid)
                union all
                select from pg_replication_slots s where age(s.xmin) >= age(v_turn.turned_by::xid))
            and v_age between interval '0' and interval '1 hour'
            and not (v_age > interval '10 minutes'
                and pg_total_relation_size(format('postroad_broker.relay_journal_%s', v_turn.segment)::regclass) > 64000000)
        then
            return false;
        end if;
        execute format('lock table postroad_broker.%I in access exclusive mode nowait', v_other);
        execute format('truncate postroad_broker.%I', v_other);
    end if;
    update postroad_broker.relay_turn
    set segment = 1 - v_turn.segment, turned_at = clock_timestamp(), turned_by = pg_current_xact_id();
    return true;
exception when lock_not_available then
    return false;
end
$$;

-- Outbox rows that could not become a message (their constraints were bypassed), recorded by the append that passed them.
create table postroad_broker.rejected_message (
    id bigint generated always as identity primary key,
    origin_id integer not null references postroad_broker.origin (id),
    -- The row's number in its outbox.
    seq bigint not null,
    -- Why, as one clause: "topic has the token ``".
    reason text not null,
    -- The row as a JSON object, `payload_bytes` in base64.
    outbox_row text not null,
    rejected_at timestamptz not null default clock_timestamp(),
    resent_at timestamptz
);
create index rejected_message_by_origin on postroad_broker.rejected_message (origin_id, id);
-- A re-relay asks whether a row is listed. Rows of a mapped table without numbers all have seq 0.
create index rejected_message_by_row on postroad_broker.rejected_message (origin_id, seq, hashtextextended(outbox_row, 0));

-- Positions that a relay had passed, a few per grace period: rows of an outbox may go once they are all before a position
-- that is stored for longer than the grace. Emptied when an origin went back in time, since its old snapshots then lie.
create table postroad_broker.relay_history (
    origin_id integer not null references postroad_broker.origin (id),
    number bigint not null,
    position text not null,
    passed_at timestamptz not null default clock_timestamp(),
    primary key (origin_id, number)
);
