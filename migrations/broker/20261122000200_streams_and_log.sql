-- Streams and the log that holds their messages.
create table postroad_broker.stream (
    id integer generated always as identity primary key,
    name text not null unique,
    -- Settings beyond the name (retention …), as the API takes them.
    settings jsonb not null default '{}',
    created_at timestamptz not null default clock_timestamp(),
    constraint stream_name_is_valid check (name ~ '^[A-Za-z0-9_.-]{1,100}$')
);

-- The topic patterns that a stream owns. That they are disjoint is checked under a lock of this table.
create table postroad_broker.stream_pattern (
    pattern text primary key,
    stream_id integer not null references postroad_broker.stream (id) on delete cascade
);

-- The row that orders the appends to a stream. Appends only lock it; retention and the fold of keys update it, once per leaf.
create table postroad_broker.stream_head (
    stream_id integer primary key references postroad_broker.stream (id) on delete cascade,
    -- Offsets up to this one are gone. Keeps offsets going on when the log is empty.
    floor bigint not null default 0,
    -- When the message at the floor was appended: the next one's time is not before it.
    floor_appended_at timestamptz,
    -- Of a keyed stream: up to which offset `key_head` counts its keys. Never below the floor.
    keys_through bigint,
    constraint stream_head_floor_not_negative check (floor >= 0)
);

-- Topics, interned: the log keeps their numbers.
create table postroad_broker.topic (
    id integer generated always as identity primary key,
    name text not null unique
);

-- The log. One partition per stream, each partitioned by range of offsets; leaves are made ahead of their use.
create table postroad_broker.message (
    stream_id integer not null,
    "offset" bigint not null,
    topic_id integer not null,
    -- xxh3-64 of the key; null without a key.
    key_hash bigint,
    appended_at timestamptz not null,
    key text,
    id text not null,
    source text not null,
    -- CloudEvents type; null means the topic.
    type text,
    subject text,
    event_time timestamptz,
    data_content_type text,
    data_schema text,
    -- JSON object of extension attributes, as raw text; null means none.
    extensions text,
    -- 0 absent, 1 JSON, 2 text, 3 binary.
    data_kind smallint not null,
    -- From the extension attribute `priority`: 0 low, 1 normal, 2 high.
    priority smallint not null default 1,
    data bytea,
    -- The origin whose relay appended it; null when published over HTTP.
    origin_id integer,
    primary key (stream_id, "offset"),
    constraint message_offset_positive check ("offset" > 0),
    constraint message_data_kind_known check (data_kind between 0 and 3),
    constraint message_priority_known check (priority between 0 and 2)
) partition by list (stream_id);
