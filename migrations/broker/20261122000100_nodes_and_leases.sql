-- Who is alive, and who may write what. Tables of the broker live in the schema postroad_broker; the schema postroad is
-- the outbox's, in this database and in every other origin.
create schema if not exists postroad_broker;

-- What makes this broker this broker: one row, written once.
create table postroad_broker.broker (
    singleton boolean primary key default true,
    id uuid not null default gen_random_uuid(),
    -- The key of the MAC in receipts: they hold across owners and restarts.
    receipt_key bytea not null,
    created_at timestamptz not null default clock_timestamp(),
    constraint broker_is_one_row check (singleton)
);

-- One row per run of a process, renewed by its heartbeat on a connection of its own. A dead incarnation never comes back.
create table postroad_broker.node (
    incarnation bigint generated always as identity primary key,
    address text not null,
    started_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    dead_at timestamptz
);

-- A claim on a slot, a relay or a duty. Locked by every fenced write, changed only at hand-over.
create table postroad_broker.lease (
    name text primary key,
    epoch bigint not null default 0,
    holder bigint references postroad_broker.node (incarnation),
    acquired_at timestamptz,
    constraint lease_epoch_not_negative check (epoch >= 0)
);
