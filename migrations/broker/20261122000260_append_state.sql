-- The tables beside the log: the catalogue's version, its leaves, recent ids, the results of appends.

-- Rises with each change of streams and their patterns. An append names the version that it was routed by.
create table postroad_broker.catalogue (
    singleton boolean primary key default true,
    version bigint not null default 1,
    constraint catalogue_is_one_row check (singleton)
);
insert into postroad_broker.catalogue default values;

-- The leaves of the log, in the order of their offsets. No foreign key: what a deleted stream leaves behind is dropped later.
create table postroad_broker.message_leaf (
    stream_id integer not null,
    first_offset bigint not null,
    last_offset bigint not null,
    table_name text not null unique,
    created_at timestamptz not null default clock_timestamp(),
    -- Its topics are in partition_topic: set once it is full.
    summarised_at timestamptz,
    -- Retention truncated it, to its last offset.
    emptied_at timestamptz,
    -- By when it ended at this offset, for messages that bear times of a clock that was ahead.
    noted_top bigint,
    noted_at timestamptz,
    primary key (stream_id, first_offset),
    constraint message_leaf_not_empty check (last_offset >= first_offset)
);

-- Which topics a full leaf holds and between which offsets, so that a scan passes over leaves that cannot match.
create table postroad_broker.partition_topic (
    stream_id integer not null,
    first_offset bigint not null,
    topic_id integer not null,
    message_count bigint not null,
    first_match bigint not null,
    last_match bigint not null,
    primary key (stream_id, first_offset, topic_id)
);

-- Ids of published messages, for at least 24 hours: five buckets of 12 hours, emptied by TRUNCATE in rotation. While the server's clock and
-- a node's are apart, an id is in the bucket of either: whichever is right, it is kept for as long. The identity
-- is a hash of stream, source and id; content one of what the message says, where it goes and when; both 128 bits of SHA-256.
create table postroad_broker.recent_id (
    bucket smallint not null,
    identity uuid not null,
    content uuid not null,
    -- Of a message that was scheduled, its number; and when it is due.
    "offset" bigint not null,
    due_at timestamptz
) partition by list (bucket);

-- The results of group commits, for at least 10 minutes after the group was made: what an appender that lost its connection asks
-- again for, as soon as it has another. Four buckets of 10 minutes: a row is written per group, hundreds in a second.
create table postroad_broker.append_journal (
    bucket smallint not null,
    incarnation bigint not null,
    number bigint not null,
    stream_first bigint[] not null,
    stream_at timestamptz[] not null,
    refused_member integer[] not null,
    refused_found bigint[] not null,
    seen_message integer[] not null,
    seen_offset bigint[] not null,
    seen_conflict boolean[] not null,
    conflict_message integer[] not null,
    conflict_version bigint[] not null,
    seen_due timestamptz[] not null,
    scheduled_number bigint[] not null,
    primary key (bucket, incarnation, number)
) partition by list (bucket);

-- Nothing here updates or deletes its rows; doing so by hand works even where there is a publication for all tables.
alter table postroad_broker.recent_id replica identity full;

do $$
begin
    for bucket in 0..4 loop
        execute format(
            'create table postroad_broker.recent_id_%1$s partition of postroad_broker.recent_id '
            'for values in (%1$s) with (autovacuum_enabled = false)', bucket);
        execute format('create unique index on postroad_broker.recent_id_%s (identity)', bucket);
        execute format('alter table postroad_broker.recent_id_%s replica identity full', bucket);
    end loop;
    for bucket in 0..3 loop
        execute format(
            'create table postroad_broker.append_journal_%1$s partition of postroad_broker.append_journal '
            'for values in (%1$s) with (autovacuum_enabled = false, toast.autovacuum_enabled = false)', bucket);
    end loop;
end
$$;

-- Which period of 12 hours a time is in. Stable, as extract is: called immutable, it would not be inlined.
create function postroad_broker.half_day(p_at timestamptz) returns bigint
language sql stable strict parallel safe
return floor(extract(epoch from p_at) / 43200)::bigint;

-- Which period of 10 minutes a time is in.
create function postroad_broker.ten_minutes(p_at timestamptz) returns bigint
language sql stable strict parallel safe
return floor(extract(epoch from p_at) / 600)::bigint;

-- When the server's clock and a node's last agreed, as nodes note each minute: what a node goes by whose own clock is behind. No
-- clock that is wrong alone gets in here.
create table postroad_broker.clock_agreement (
    singleton boolean primary key default true,
    agreed_at timestamptz not null default '-infinity',
    constraint clock_agreement_is_one_row check (singleton)
);
insert into postroad_broker.clock_agreement default values;

-- Notes that they agree, if they do. Also after both were ahead: then it goes back.
create function postroad_broker.note_clocks(p_witness timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_now timestamptz := clock_timestamp();
begin
    if p_witness between v_now - interval '1 minute' and v_now + interval '1 minute' then
        update postroad_broker.clock_agreement c set agreed_at = least(v_now, p_witness)
        where c.agreed_at not between v_now - interval '30 seconds' and v_now;
    end if;
end
$$;

-- The time to act by when the server's clock says p_clock: that, unless it is more than a minute ahead of a node's (p_witness). Then the
-- node's, but no time before the two last agreed: nothing is published, and nobody's time is over, by a clock that jumped; and by one
-- that is behind nothing is as old as it says.
create function postroad_broker.agreed_time(p_clock timestamptz, p_witness timestamptz) returns timestamptz
language sql stable set search_path = pg_catalog, pg_temp as $$
    select case when p_clock > p_witness + interval '1 minute'
        then least(p_clock, greatest(p_witness, (select c.agreed_at from postroad_broker.clock_agreement c)))
        else p_clock
    end
$$;

-- The same for the server's clock as it is now. Looked up by name, so not as `return`.
create function postroad_broker.agreed_clock(p_witness timestamptz) returns timestamptz
language sql volatile set search_path = pg_catalog, pg_temp as $$
    select postroad_broker.agreed_time(clock_timestamp(), p_witness)
$$;

-- Topics to numbers. New ones are inserted under a lock, so that their numbers commit in order: who has read all topics up
-- to a number misses none below it. Fails with SQLSTATE PR002 beyond p_most topics.
create function postroad_broker.intern_topics(p_names text[], p_most bigint)
returns table (topic_id integer, topic_name text)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    perform from unnest(p_names) as n (name)
    where not exists (select from postroad_broker.topic t where t.name = n.name);
    if found then
        perform from postroad_broker.catalogue for no key update;
        if (select coalesce(max(t.id), 0) from postroad_broker.topic t) + cardinality(p_names) > p_most then
            raise exception 'there are as many topics as there can be' using errcode = 'PR002';
        end if;
        insert into postroad_broker.topic (name)
        select distinct n.name from unnest(p_names) as n (name)
        where not exists (select from postroad_broker.topic t where t.name = n.name)
        order by n.name;
    end if;
    return query select t.id, t.name from postroad_broker.topic t where t.name = any (p_names);
end
$$;

-- The top of a stream's log, not before `p_from`; null when there is nothing. Looks at the leaf of that offset, and at those after
-- it only when it is full. Each leaf by its name: a look at the whole log is planned over all its leaves, which took four times
-- as long, and a kept plan locks all of them.
create function postroad_broker.stream_top(p_stream integer, p_from bigint, out top bigint, out top_at timestamptz)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    v_leaf record;
    v_top bigint;
    v_top_at timestamptz;
begin
    select l.first_offset, l.last_offset, l.table_name into v_leaf from postroad_broker.message_leaf l
    where l.stream_id = p_stream and l.first_offset <= p_from order by l.first_offset desc limit 1;
    while found loop
        execute format(
            'select m."offset", m.appended_at from postroad_broker.%I m '
            'where m.stream_id = $1 and m."offset" >= $2 order by m."offset" desc limit 1', v_leaf.table_name)
        into v_top, v_top_at using p_stream, p_from;
        exit when v_top is null;
        top := v_top;
        top_at := v_top_at;
        exit when top < v_leaf.last_offset;
        select l.first_offset, l.last_offset, l.table_name into v_leaf from postroad_broker.message_leaf l
        where l.stream_id = p_stream and l.first_offset > v_leaf.first_offset order by l.first_offset limit 1;
    end loop;
end
$$;

-- The top of a stream's log, wherever it is; null when there is nothing. From the last leaf down, each by its name: a look at the
-- whole log would lock all leaves.
create function postroad_broker.stream_last(p_stream integer, out top bigint, out top_at timestamptz)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    v_name text;
begin
    for v_name in
        select l.table_name from postroad_broker.message_leaf l
        where l.stream_id = p_stream and l.emptied_at is null order by l.first_offset desc
    loop
        execute format(
            'select m."offset", m.appended_at from postroad_broker.%I m '
            'where m.stream_id = $1 order by m."offset" desc limit 1', v_name)
        into top, top_at using p_stream;
        exit when top is not null;
    end loop;
end
$$;
