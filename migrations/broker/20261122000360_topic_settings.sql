-- Rules for publishing to topics: settings that people declare by pattern. Few rows, read whole by every node when the version
-- has changed.
create table postroad_broker.topic_settings (
    -- A topic, or a pattern over topics.
    pattern text primary key,
    -- JSON Schema, as it was given.
    schema text,
    max_bytes bigint,
    rate_per_second double precision,
    burst bigint,
    created_at timestamptz not null default clock_timestamp(),
    changed_at timestamptz not null default clock_timestamp(),
    constraint topic_settings_pattern_is_1_to_255_bytes check (octet_length(pattern) between 1 and 255),
    constraint topic_settings_max_bytes_positive check (max_bytes > 0),
    constraint topic_settings_rate_positive check (rate_per_second > 0),
    constraint topic_settings_burst_has_a_rate check (burst is null or (burst > 0 and rate_per_second is not null))
);

-- Rises with each change.
create table postroad_broker.topic_settings_version (
    singleton boolean primary key default true,
    version bigint not null default 1,
    constraint topic_settings_version_is_one_row check (singleton)
);
insert into postroad_broker.topic_settings_version default values;
