-- The tables of `postroad demo`, recreated for each run. They stand for a service's own tables: Postroad does not need them.
-- The comment on the schema is how the next run knows that it may drop it.
drop schema if exists shop cascade;
create schema shop;
comment on schema shop is 'made by postroad demo';

-- One row per product. Its lock orders the orders of the product, so `version` counts them 1..n.
create table shop.stock (
    product integer primary key,
    quantity integer not null,
    version bigint not null default 0,
    constraint stock_quantity_not_negative check (quantity >= 0)
);

create table shop.orders (
    id uuid primary key,
    product integer not null references shop.stock (product),
    version bigint not null,
    quantity integer not null,
    placed_at timestamptz not null default now(),
    constraint orders_version_once_per_product unique (product, version)
);

-- The deliveries that the consumers received: one row per delivery, committed before they acknowledge it.
create table shop.received (
    queue text not null,
    consumer text not null,
    order_id uuid not null,
    product integer not null,
    version bigint not null,
    delivery integer not null,
    attempt integer not null,
    "offset" bigint not null,
    received_at timestamptz not null default clock_timestamp()
);

-- The broker's answer to each acknowledgement and refusal, as the consumers read it.
create table shop.settled (
    queue text not null,
    consumer text not null,
    order_id uuid not null,
    delivery integer not null,
    answer text not null,
    answered_at timestamptz not null default clock_timestamp()
);
