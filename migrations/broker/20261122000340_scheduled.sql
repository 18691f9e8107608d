-- Scheduled messages, which enter their stream later.
--
-- A stream's horizon is a pair (due, number): all messages up to there are in the log. `append` accepts a message that is due later
-- than that, and later than the clock, as a row here, under the head's lock; `publish_scheduled` moves the horizon over the rows that have become
-- due and copies them to the end of the log, under the same lock. So a late row comes either before the move, and is
-- found, or after it, and is appended at once. No row is touched when it is published: the horizon shows its state.

-- The order of acceptance. Taken under the head's lock, so within a stream it is the order of commits.
create sequence postroad_broker.scheduled_number as bigint cache 1;

-- Three tiers, so that an append never needs a leaf that is not there, however far ahead its times are, and a row is never moved:
-- 0: leaves of 6 hours for the next days, made ahead; most of what is scheduled. Emptied by TRUNCATE when all of it is long past.
-- 1: leaves of a month for the year that can be asked for, made ahead; emptied in the same way.
-- 2: one table for messages without a leaf at the time when they were accepted. Its rows are deleted, some at a time, when they are long past.
-- The tier of a row is chosen when it is accepted (`scheduled_tiers`). All is read by (due, number), over all tiers.
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
    tier smallint not null default 2,
    primary key (stream_id, due_at, number, tier),
    constraint scheduled_message_number_positive check (number > 0),
    constraint scheduled_message_data_kind_known check (data_kind between 0 and 3),
    constraint scheduled_message_priority_known check (priority between 0 and 2)
) partition by list (tier);
create table postroad_broker.scheduled_near partition of postroad_broker.scheduled_message for values in (0)
partition by range (due_at);
create table postroad_broker.scheduled_month partition of postroad_broker.scheduled_message for values in (1)
partition by range (due_at);
create table postroad_broker.scheduled_rest partition of postroad_broker.scheduled_message for values in (2);

-- One row per move of a horizon, inserted by the commit that appended what lay between: never an update per commit. The row with
-- the highest pair is the horizon. In leaves of 6 hours by when it was moved, or by the horizon where that is ahead of the clock: so a
-- horizon that moves over years needs one leaf.
create table postroad_broker.scheduled_publication (
    stream_id integer not null,
    due_at timestamptz not null,
    number bigint not null,
    -- The offset of the last message appended, by which that of each before it is counted back; the log's end when there was none.
    last_offset bigint not null,
    message_count integer not null,
    published_at timestamptz not null,
    filed_at timestamptz not null,
    primary key (stream_id, due_at, number, filed_at)
) partition by range (filed_at);

-- The streams that had something scheduled, with the horizon as far as its rows are gone from scheduled_publication.
create table postroad_broker.scheduled_stream (
    stream_id integer primary key references postroad_broker.stream (id) on delete cascade,
    due_at timestamptz not null default '-infinity',
    number bigint not null default 0
);

-- The leaves of both, by kind: `near` and `month` of messages, `publication`.
create table postroad_broker.scheduled_leaf (
    kind text not null,
    first_at timestamptz not null,
    last_at timestamptz not null,
    table_name text not null unique,
    created_at timestamptz not null default clock_timestamp(),
    -- It was truncated; dropped when nobody has the parent open.
    emptied_at timestamptz,
    primary key (kind, first_at),
    constraint scheduled_leaf_kind_known check (kind in ('near', 'month', 'publication')),
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

-- The tier that a row goes to, by when it is due: the finest that has a leaf for that time. Asked under the head's lock: no leaf is
-- emptied meanwhile.
create function postroad_broker.scheduled_tiers(p_dues timestamptz[]) returns smallint[]
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
declare
    v_near_first timestamptz[];
    v_near_last timestamptz[];
    v_month_first timestamptz[];
    v_month_last timestamptz[];
begin
    select coalesce(array_agg(l.first_at order by l.first_at), '{}'), coalesce(array_agg(l.last_at order by l.first_at), '{}')
    into v_near_first, v_near_last
    from postroad_broker.scheduled_leaf l where l.kind = 'near' and l.emptied_at is null;
    select coalesce(array_agg(l.first_at order by l.first_at), '{}'), coalesce(array_agg(l.last_at order by l.first_at), '{}')
    into v_month_first, v_month_last
    from postroad_broker.scheduled_leaf l where l.kind = 'month' and l.emptied_at is null;
    return array(
        select case
            when d.due < v_near_last[width_bucket(d.due, v_near_first)] then 0
            when d.due < v_month_last[width_bucket(d.due, v_month_first)] then 1
            else 2
        end::smallint
        from unnest(p_dues) with ordinality as d (due, place)
        order by d.place);
end
$$;

-- The time from which on published messages are remembered: rows of an earlier due time are there for longer in the coarse tiers, and
-- can no longer be counted by.
create function postroad_broker.scheduled_remembered() returns timestamptz
language sql stable set search_path = pg_catalog, pg_temp as $$
    select coalesce(min(l.first_at), '-infinity') from postroad_broker.scheduled_leaf l
    where l.kind = 'near' and l.emptied_at is null
$$;

-- For each message of a group its number if it must be scheduled, null otherwise; empty when none is.
--
-- A message is scheduled if it is due later than the clock and the horizon. A message that is due by now enters the stream at once,
-- with one exception: while older rows of the stream wait to be published, it queues behind those that are due no later than it. So a stream
-- has what was scheduled in the order (due, acceptance), also when much is due at one instant. p_clock is `agreed_clock`.
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

-- Publishes the next of a stream's messages that are due, in the order (due, number): p_max_messages at most, and p_max_bytes of
-- payload, but always one. One commit: what it appended lies between the old horizon and the new one. Called at read committed
-- and outside of a transaction, by any number of nodes; when the outcome of a call is unknown, the next call goes by the stored state.
--
-- It waits in line for the head, and no longer than a moment for anything else, as `append` does.
--
-- `agreed_clock` decides which messages are due. Statuses: published (which can be 0 messages, all cancelled); idle, nothing is due; gone, there is
-- no such stream.
create function postroad_broker.publish_scheduled(
    p_stream integer,
    p_hint bigint,
    p_max_messages integer,
    p_max_bytes bigint,
    p_witness timestamptz,
    out status text,
    out last_offset bigint,
    out message_count integer
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '3s'
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
    v_wait text;
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
    v_wait := set_config('lock_timeout', '200ms', true);
    v_clock := postroad_broker.agreed_clock(p_witness);
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
        select t.top, t.top_at into v_top, v_top_at from postroad_broker.stream_last(p_stream) t;
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
    insert into postroad_broker.scheduled_publication (
        stream_id, due_at, number, last_offset, message_count, published_at, filed_at
    ) values (
        p_stream, v_to_due, v_to_number, last_offset, message_count, v_clock, greatest(v_clock, v_to_due)
    );
    status := 'published';
end
$$;

-- The next due row of each stream, within p_ahead of the clock: its due time, a cancelled one included, since the horizon
-- has to move over it; and until when publications can be filed. The clock is `agreed_clock`.
create function postroad_broker.next_scheduled(p_ahead interval, p_witness timestamptz)
returns table (stream_id integer, due_at timestamptz, clock timestamptz, files_until timestamptz)
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
        using v_stream, v_horizon.due_at, v_horizon.number,
            greatest(postroad_broker.agreed_clock(p_witness), v_horizon.due_at) + p_ahead;
        stream_id := v_stream;
        due_at := v_due;
        clock := postroad_broker.agreed_clock(p_witness);
        files_until := greatest(clock, v_horizon.due_at);
        return next;
    end loop;
end
$$;

-- The number of a stream's waiting messages, at most p_most.
create function postroad_broker.count_waiting(p_stream integer, p_most bigint) returns bigint
language plpgsql stable
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    v_horizon record;
    v_count bigint;
begin
    select h.due_at, h.number into v_horizon from postroad_broker.scheduled_horizon(p_stream) h;
    execute 'select count(*) from (select from postroad_broker.scheduled_message m '
        'where m.stream_id = $1 and m.due_at >= $2 and (m.due_at, m.number) > ($2, $3) and m.cancelled_at is null limit $4) w'
    into v_count using p_stream, v_horizon.due_at, v_horizon.number, p_most;
    return v_count;
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
    -- Planned anew each time: only the leaves of that time are looked at.
    execute 'select true, m.cancelled_at from postroad_broker.scheduled_message m '
        'where m.stream_id = $1 and m.due_at = $2 and m.number = $3'
    into v_is_found, v_cancelled_at using p_stream, p_due, p_number;
    if v_is_found is null then
        return;
    end if;
    if v_cancelled_at is not null then
        status := case when p_due < postroad_broker.scheduled_remembered() then 'unknown' else 'cancelled' end;
        return;
    end if;
    select h.due_at, h.number into v_horizon from postroad_broker.scheduled_horizon(p_stream) h;
    if (p_due, p_number) <= (v_horizon.due_at, v_horizon.number) then
        if p_due < postroad_broker.scheduled_remembered() then
            return;
        end if;
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
