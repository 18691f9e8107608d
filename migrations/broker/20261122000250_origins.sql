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

-- One row per append of a relay, inserted by the append's own transaction. Truncated by the fold. No foreign key: its
-- check would lock the origin's row in every append.
create table postroad_broker.relay_journal (
    origin_id integer not null,
    number bigint not null,
    -- The epoch of the relay's lease, for people who read it after an incident.
    epoch bigint not null,
    -- JSON, see the relay's module of the same name.
    position text not null,
    appended_at timestamptz not null default clock_timestamp(),
    primary key (origin_id, number),
    constraint relay_journal_number_positive check (number > 0)
) with (autovacuum_enabled = false);

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

-- Positions that a relay had passed, a few per grace period: rows of an outbox may go once they are all before a position
-- that is stored for longer than the grace. Emptied when an origin went back in time, since its old snapshots then lie.
create table postroad_broker.relay_history (
    origin_id integer not null references postroad_broker.origin (id),
    number bigint not null,
    position text not null,
    passed_at timestamptz not null default clock_timestamp(),
    primary key (origin_id, number)
);
