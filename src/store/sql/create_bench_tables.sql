-- The tables of `postroad bench`, in a schema of their own that is dropped at the end.
drop schema if exists postroad_bench cascade;
create schema postroad_bench;
comment on schema postroad_bench is 'made by postroad bench';

-- Stands for the producer's own data: one row in each of its transactions.
create table postroad_bench.business (
    id bigint generated always as identity primary key,
    producer integer not null,
    number bigint not null,
    note text not null
);

-- The raw limit: nothing but the payload is kept, and no index is.
create table postroad_bench.raw (payload text not null);

-- A queue as it is usually made from a table: a row is claimed by moving the time from which it is visible again, and deleted
-- when it is done.
create table postroad_bench.lease (
    id bigint generated always as identity primary key,
    visible_at timestamptz not null default clock_timestamp(),
    deliveries integer not null default 0,
    producer integer not null,
    number bigint not null,
    key text,
    payload text not null
);
create index lease_visible_at on postroad_bench.lease (visible_at);
