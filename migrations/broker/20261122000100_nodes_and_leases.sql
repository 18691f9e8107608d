-- Who is alive, and who may write what. Tables of the broker live in the schema postroad_broker; the schema postroad is
-- the outbox's, in this database and in every other origin.
create schema if not exists postroad_broker;

-- The migration that a program must know to run on this schema. Programs go on with migrations that they do not know, since those
-- only add. A migration that removes something, once no program uses it, sets this to the migration that brought the successor;
-- older programs then refuse to start.
create table postroad_broker.schema_needs (
    singleton boolean primary key default true,
    version bigint not null default 0,
    constraint schema_needs_is_one_row check (singleton)
);
insert into postroad_broker.schema_needs default values;

-- The identity of this broker: one row, written once.
create table postroad_broker.broker (
    singleton boolean primary key default true,
    id uuid not null default gen_random_uuid(),
    -- The key of the MAC in receipts: they hold across owners and restarts.
    receipt_key bytea not null,
    created_at timestamptz not null default clock_timestamp(),
    constraint broker_is_one_row check (singleton)
);

-- One row per run of a process, renewed by its heartbeat on a separate connection. A dead incarnation never comes back.
create table postroad_broker.node (
    incarnation bigint generated always as identity primary key,
    -- Names the listening process: no two have the same at a time.
    address text not null,
    -- The URL at which other nodes reach it.
    url text not null,
    started_at timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    -- How long it lives without a heartbeat: an observer that sees no heartbeat for so long need not believe in expires_at,
    -- which a clock that jumped back has left in the future.
    ttl_seconds double precision not null,
    -- The leases that it can hold, slots as `slot/*`.
    wants text[] not null default '{}',
    -- It is about to end, and hands over what it holds.
    is_leaving boolean not null default false,
    -- The number of its last heartbeat. A process that finds a lower one than it has written looks at an older copy of this database.
    beat bigint not null default 0,
    -- Deliveries in a second out of each slot, about: 64 numbers, 0 for those that others hold. Empty when it is alone.
    slot_loads integer[] not null default '{}',
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

-- The assignment of leases to nodes, written by the holder of the lease `leader`. A node asks for no other leases, and gives back
-- leases that are assigned to others.
create table postroad_broker.assignment (
    name text primary key,
    -- An incarnation. Not a reference: the leader notices when it is gone.
    node bigint not null
);
