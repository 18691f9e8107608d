-- Messages that are to enter their stream later.
--
-- A stream's horizon is a pair (due, number): all of it up to there is in the log. `append` accepts what is due later than that, and
-- later than the clock, as a row here, under the head's lock; `publish_scheduled` moves the horizon over the rows that have become
-- due and copies them to the end of the log, under the same lock. So who comes late is before the move, and found, or after it,
-- and appended at once. No row is touched when it is published: what became of it is the horizon's to say.

-- The order of acceptance. Taken under the head's lock, so within a stream it is the order of commits.
create sequence postroad_broker.scheduled_number as bigint cache 1;

-- Leaves of 6 hours by due time, made before the first row of one is written, emptied when all of it is long past.
create table postroad_broker.scheduled_message (
    stream_id integer not null,
    due_at timestamptz not null,
    number bigint not null,
    topic_id integer not null,
    key_hash bigint,
    key text,
    id text not null,
    source text not null,
    type text,
    subject text,
    event_time timestamptz,
    data_content_type text,
    data_schema text,
    extensions text,
    data_kind smallint not null,
    priority smallint not null default 1,
    data bytea,
    origin_id integer,
    accepted_at timestamptz not null,
    -- A person's act, and rare: the one update of a row.
    cancelled_at timestamptz,
    primary key (stream_id, due_at, number),
    constraint scheduled_message_number_positive check (number > 0),
    constraint scheduled_message_data_kind_known check (data_kind between 0 and 3),
    constraint scheduled_message_priority_known check (priority between 0 and 2)
) partition by range (due_at);

-- One row per move of a horizon, inserted by the commit that appended what lay between: never an update per commit. The row with
-- the highest pair is the horizon. In leaves of its own, which are made as horizons come to them, so that there are few.
create table postroad_broker.scheduled_publication (
    stream_id integer not null,
    due_at timestamptz not null,
    number bigint not null,
    -- The offset of the last message appended, by which that of each before it is counted back; the log's end when there was none.
    last_offset bigint not null,
    message_count integer not null,
    published_at timestamptz not null,
    primary key (stream_id, due_at, number)
) partition by range (due_at);

-- The streams that had something scheduled, with the horizon as far as its rows are gone from scheduled_publication.
create table postroad_broker.scheduled_stream (
    stream_id integer primary key references postroad_broker.stream (id) on delete cascade,
    due_at timestamptz not null default '-infinity',
    number bigint not null default 0
);

-- The leaves of both, by name: `message` and `publication`.
create table postroad_broker.scheduled_leaf (
    kind text not null,
    first_at timestamptz not null,
    last_at timestamptz not null,
    table_name text not null unique,
    created_at timestamptz not null default clock_timestamp(),
    -- It was truncated; dropped when nobody has the parent open.
    emptied_at timestamptz,
    primary key (kind, first_at),
    constraint scheduled_leaf_kind_known check (kind in ('message', 'publication')),
    constraint scheduled_leaf_not_empty check (last_at > first_at)
);

-- The horizon of a stream. Read in a statement that begins after the head's lock was had.
create function postroad_broker.scheduled_horizon(p_stream integer, out due_at timestamptz, out number bigint)
language sql stable
begin atomic
    select h.due_at, h.number
    from (
        (
            select p.due_at, p.number from postroad_broker.scheduled_publication p
            where p.stream_id = p_stream order by p.due_at desc, p.number desc limit 1
        )
        union all
        select s.due_at, s.number from postroad_broker.scheduled_stream s where s.stream_id = p_stream
        union all
        select timestamptz '-infinity', 0
    ) h
    order by h.due_at desc, h.number desc
    limit 1;
end;

-- For each message of a group its number if it is to be scheduled, null otherwise; empty when none is.
--
-- Scheduled is what is due later than the clock and than the horizon. What is due by now enters the stream at once, but for one
-- thing: while older rows of the stream wait to be published, it queues behind those that are due no later than it. So a stream
-- has what was scheduled in the order (due, acceptance), also when much is due at one instant.
create function postroad_broker.number_scheduled(
    p_clock timestamptz,
    s_id integer[],
    m_member integer[],
    m_stream integer[],
    m_due timestamptz[],
    p_refused integer[],
    p_seen integer[]
) returns bigint[]
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_now timestamptz[] := '{}';
    v_first timestamptz[] := '{}';
    v_horizon record;
    v_waiting timestamptz;
    v_numbers bigint[];
begin
    for s in 1..cardinality(s_id) loop
        select h.due_at, h.number into v_horizon from postroad_broker.scheduled_horizon(s_id[s]) h;
        v_now[s] := greatest(p_clock, v_horizon.due_at);
        -- Planned anew each time: only the leaves between the two times are looked at.
        execute 'select m.due_at from postroad_broker.scheduled_message m '
            'where m.stream_id = $1 and m.due_at >= $2 and m.due_at <= $4 and (m.due_at, m.number) > ($2, $3) '
            'order by m.due_at, m.number limit 1'
        into v_waiting using s_id[s], v_horizon.due_at, v_horizon.number, v_now[s];
        v_first[s] := v_waiting;
    end loop;
    select array_agg(case when k.is_later then nextval('postroad_broker.scheduled_number') end)
    into v_numbers
    from (
        select coalesce(m.due > v_now[m.stream] or m.due >= v_first[m.stream], false)
            and not (m.member = any (p_refused) or m.place = any (p_seen)) as is_later
        from unnest(m_member, m_stream, m_due) with ordinality as m (member, stream, due, place)
        order by m.place
    ) k;
    if not exists (select from unnest(v_numbers) as n where n is not null) then
        return '{}';
    end if;
    return v_numbers;
end
$$;

-- Makes the leaves that these times fall into, where they are missing. Statements of DDL, so never under a head's lock.
create function postroad_broker.extend_scheduled(p_kind text, p_times timestamptz[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_first timestamptz;
    v_name text;
begin
    for v_first in
        select distinct to_timestamp(floor(extract(epoch from t) / 21600) * 21600) as first_at
        from unnest(p_times) as t
        order by first_at
    loop
        v_name := format('scheduled_%s_%s', p_kind, to_char(v_first at time zone 'UTC', 'YYYYMMDDHH24'));
        -- Two makers: the second waits here for the first, and has nothing to do.
        insert into postroad_broker.scheduled_leaf (kind, first_at, last_at, table_name)
        values (p_kind, v_first, v_first + interval '21600 seconds', v_name)
        on conflict do nothing;
        if found then
            execute format(
                'create table postroad_broker.%I (like postroad_broker.%I including all) '
                'with (autovacuum_enabled = false, toast.autovacuum_enabled = false, toast_tuple_target = 4080)',
                v_name, 'scheduled_' || p_kind);
            if p_kind = 'message' then
                execute format('alter table postroad_broker.%I alter column data set storage main', v_name);
            end if;
            execute format(
                'alter table postroad_broker.%I attach partition postroad_broker.%I for values from (%L) to (%L)',
                'scheduled_' || p_kind, v_name, v_first, v_first + interval '21600 seconds');
        end if;
    end loop;
end
$$;

-- Publishes the next of a stream's messages that are due, in the order (due, number): p_max_messages at most, and p_max_bytes of
-- payload, but always one. One commit: what it appended lies between the old horizon and the new one. Called at read committed
-- and outside of a transaction, by any number of nodes; when the outcome of a call is unknown, the next call goes by what is there.
--
-- Statuses: published (which can be 0 messages, all cancelled); idle, nothing is due; gone, there is no such stream.
create function postroad_broker.publish_scheduled(
    p_stream integer,
    p_hint bigint,
    p_max_messages integer,
    p_max_bytes bigint,
    out status text,
    out last_offset bigint,
    out message_count integer
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    v_clock timestamptz;
    v_due timestamptz;
    v_number bigint;
    v_now timestamptz;
    v_to_due timestamptz;
    v_to_number bigint;
    v_floor bigint;
    v_floor_at timestamptz;
    v_top bigint;
    v_top_at timestamptz;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'publish_scheduled must run at read committed' using errcode = 'invalid_transaction_state';
    end if;
    message_count := 0;
    perform from postroad_broker.stream_head h where h.stream_id = p_stream for no key update;
    if not found then
        status := 'gone';
        return;
    end if;
    v_clock := clock_timestamp();
    select h.due_at, h.number into v_due, v_number from postroad_broker.scheduled_horizon(p_stream) h;
    -- A clock that went back does not bring the horizon back.
    v_now := greatest(v_clock, v_due);
    execute 'select p.due_at, p.number from ('
        'select s.due_at, s.number, row_number() over w as place, sum(s.bytes) over w as bytes from ('
        'select m.due_at, m.number, 512 + coalesce(octet_length(m.data), 0) as bytes from postroad_broker.scheduled_message m '
        'where m.stream_id = $1 and m.due_at >= $2 and m.due_at <= $4 and (m.due_at, m.number) > ($2, $3) '
        'order by m.due_at, m.number limit $5) s '
        'window w as (order by s.due_at, s.number rows unbounded preceding)) p '
        'where p.place = 1 or p.bytes <= $6 order by p.due_at desc, p.number desc limit 1'
    into v_to_due, v_to_number using p_stream, v_due, v_number, v_now, p_max_messages, p_max_bytes;
    if v_to_due is null then
        status := 'idle';
        return;
    end if;

    select h.floor, h.floor_appended_at into v_floor, v_floor_at
    from postroad_broker.stream_head h where h.stream_id = p_stream;
    select t.top, t.top_at into v_top, v_top_at
    from postroad_broker.stream_top(p_stream, greatest(p_hint, v_floor + 1)) t;
    if v_top is null and v_floor < p_hint then
        -- The hint is beyond the log, as in `append`.
        execute 'select m."offset", m.appended_at from postroad_broker.message m '
            'where m.stream_id = $1 order by m."offset" desc limit 1'
        into v_top, v_top_at using p_stream;
    end if;

    execute 'insert into postroad_broker.message ('
        'stream_id, "offset", topic_id, key_hash, appended_at, key, id, source, type, subject, event_time, '
        'data_content_type, data_schema, extensions, data_kind, priority, data, origin_id) '
        'select m.stream_id, $6 + row_number() over (order by m.due_at, m.number), m.topic_id, m.key_hash, $7, m.key, '
        'm.id, m.source, m.type, m.subject, m.event_time, m.data_content_type, m.data_schema, m.extensions, m.data_kind, '
        'm.priority, m.data, m.origin_id '
        'from postroad_broker.scheduled_message m '
        'where m.stream_id = $1 and m.due_at >= $2 and m.due_at <= $4 and (m.due_at, m.number) > ($2, $3) '
        'and (m.due_at, m.number) <= ($4, $5) and m.cancelled_at is null '
        'order by m.due_at, m.number'
    using p_stream, v_due, v_number, v_to_due, v_to_number, greatest(v_top, v_floor),
        greatest(v_clock, v_top_at, v_floor_at);
    get diagnostics message_count = row_count;
    last_offset := greatest(v_top, v_floor) + message_count;
    insert into postroad_broker.scheduled_publication (stream_id, due_at, number, last_offset, message_count, published_at)
    values (p_stream, v_to_due, v_to_number, last_offset, message_count, v_clock);
    status := 'published';
end
$$;

-- What comes next for each stream, within p_ahead of the clock: when its next row is due, a cancelled one included, since the horizon
-- has to move over it. `is_due` by the database's clock.
create function postroad_broker.next_scheduled(p_ahead interval)
returns table (stream_id integer, due_at timestamptz, clock timestamptz)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_stream integer;
    v_horizon record;
    v_due timestamptz;
begin
    for v_stream in select s.stream_id from postroad_broker.scheduled_stream s order by s.stream_id loop
        select h.due_at, h.number into v_horizon from postroad_broker.scheduled_horizon(v_stream) h;
        execute 'select m.due_at from postroad_broker.scheduled_message m '
            'where m.stream_id = $1 and m.due_at >= $2 and m.due_at <= $4 and (m.due_at, m.number) > ($2, $3) '
            'order by m.due_at, m.number limit 1'
        into v_due
        using v_stream, v_horizon.due_at, v_horizon.number, greatest(clock_timestamp(), v_horizon.due_at) + p_ahead;
        stream_id := v_stream;
        due_at := v_due;
        clock := clock_timestamp();
        return next;
    end loop;
end
$$;

-- The offset of a message that was published: counted back from the publication that took it.
create function postroad_broker.scheduled_offset(p_stream integer, p_due timestamptz, p_number bigint) returns bigint
language sql stable
begin atomic
    select p.last_offset - (
        select count(*) from postroad_broker.scheduled_message m
        where m.stream_id = p_stream and m.due_at >= p_due and m.due_at <= p.due_at
            and (m.due_at, m.number) > (p_due, p_number) and (m.due_at, m.number) <= (p.due_at, p.number)
            and m.cancelled_at is null)
    from postroad_broker.scheduled_publication p
    where p.stream_id = p_stream and p.due_at >= p_due and (p.due_at, p.number) >= (p_due, p_number)
    order by p.due_at, p.number
    limit 1;
end;

-- Cancels a message that is not in its stream yet. Under the head's lock, so that it is either cancelled or published.
-- Statuses: cancelled (also when it was before); published, with its offset; unknown.
create function postroad_broker.cancel_scheduled(
    p_stream integer,
    p_due timestamptz,
    p_number bigint,
    out status text,
    out "offset" bigint,
    out is_new boolean
)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_horizon record;
    v_is_found boolean;
    v_cancelled_at timestamptz;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'cancel_scheduled must run at read committed' using errcode = 'invalid_transaction_state';
    end if;
    status := 'unknown';
    is_new := false;
    perform from postroad_broker.stream_head h where h.stream_id = p_stream for no key update;
    if not found then
        return;
    end if;
    -- Planned anew each time: only the leaf of that time is looked at.
    execute 'select true, m.cancelled_at from postroad_broker.scheduled_message m '
        'where m.stream_id = $1 and m.due_at = $2 and m.number = $3'
    into v_is_found, v_cancelled_at using p_stream, p_due, p_number;
    if v_is_found is null then
        return;
    end if;
    if v_cancelled_at is not null then
        status := 'cancelled';
        return;
    end if;
    select h.due_at, h.number into v_horizon from postroad_broker.scheduled_horizon(p_stream) h;
    if (p_due, p_number) <= (v_horizon.due_at, v_horizon.number) then
        status := 'published';
        "offset" := postroad_broker.scheduled_offset(p_stream, p_due, p_number);
        return;
    end if;
    execute 'update postroad_broker.scheduled_message m set cancelled_at = clock_timestamp() '
        'where m.stream_id = $1 and m.due_at = $2 and m.number = $3'
    using p_stream, p_due, p_number;
    status := 'cancelled';
    is_new := true;
end
$$;

-- Empties a leaf whose time has been over for p_keep, if all of it is behind the horizons, and drops one that was emptied before.
-- Returns what it did: null is nothing. Fails at once, or after 50 ms, with lock_not_available when somebody is in the way.
--
-- The heads are locked first, then the leaf; what decides is looked at after that. A leaf of publications is left alone while one
-- of messages of its time is there, whose offsets it tells, and its last horizon goes into scheduled_stream.
create function postroad_broker.empty_scheduled_leaf(p_kind text, p_first timestamptz, p_now timestamptz, p_keep interval)
returns text
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms'
as $$
declare
    v_leaf record;
    v_has_rows boolean;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'empty_scheduled_leaf must run at read committed' using errcode = 'invalid_transaction_state';
    end if;
    select l.table_name, l.last_at, l.emptied_at into v_leaf
    from postroad_broker.scheduled_leaf l where l.kind = p_kind and l.first_at = p_first;
    if not found or v_leaf.last_at + p_keep > least(p_now, clock_timestamp()) then
        return null;
    end if;
    if p_kind = 'publication' and exists (
        select from postroad_broker.scheduled_leaf l
        where l.kind = 'message' and l.first_at <= p_first and l.emptied_at is null
    ) then
        return null;
    end if;
    perform from postroad_broker.stream_head h order by h.stream_id for no key update;
    execute format('lock table postroad_broker.%I in access exclusive mode nowait', v_leaf.table_name);
    execute format('select exists (select from postroad_broker.%I)', v_leaf.table_name) into v_has_rows;
    if not v_has_rows then
        execute format('drop table postroad_broker.%I', v_leaf.table_name);
        delete from postroad_broker.scheduled_leaf l where l.kind = p_kind and l.first_at = p_first;
        return 'dropped';
    end if;
    if p_kind = 'message' then
        execute format(
            'select exists ('
            'select from postroad_broker.scheduled_stream s cross join lateral postroad_broker.scheduled_horizon(s.stream_id) h '
            'where exists (select from postroad_broker.%I m where m.stream_id = s.stream_id and (m.due_at, m.number) > (h.due_at, h.number)))',
            v_leaf.table_name) into v_has_rows;
        if v_has_rows then
            return null;
        end if;
    else
        execute format(
            'update postroad_broker.scheduled_stream s set due_at = p.due_at, number = p.number from ('
            'select distinct on (stream_id) stream_id, due_at, number from postroad_broker.%I '
            'order by stream_id, due_at desc, number desc) p '
            'where p.stream_id = s.stream_id and (p.due_at, p.number) > (s.due_at, s.number)', v_leaf.table_name);
    end if;
    execute format('truncate postroad_broker.%I', v_leaf.table_name);
    update postroad_broker.scheduled_leaf l set emptied_at = clock_timestamp() where l.kind = p_kind and l.first_at = p_first;
    return 'emptied';
end
$$;
