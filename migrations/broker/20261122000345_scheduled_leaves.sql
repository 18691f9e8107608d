-- The leaves of scheduled messages: made ahead of their use by the duty, emptied when their time is over. No append waits for one.

-- The leaf of a kind that a time falls into: its first time, and the first after it.
create function postroad_broker.scheduled_leaf_of(p_kind text, p_time timestamptz, out first_at timestamptz, out last_at timestamptz)
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    if p_kind = 'month' then
        first_at := date_trunc('month', p_time, 'UTC');
        last_at := (first_at at time zone 'UTC' + interval '1 month') at time zone 'UTC';
    else
        first_at := to_timestamp(floor(extract(epoch from p_time) / 21600) * 21600);
        last_at := first_at + interval '21600 seconds';
    end if;
end
$$;

-- The times whose leaves are missing: of 6 hours from now to 3 days ahead, of months as far as can be asked for, and
-- for the next moves of horizons. The nearest first. A broker that never schedules anything has none.
create function postroad_broker.missing_scheduled_leaves(p_now timestamptz)
returns table (kind text, leaf_at timestamptz)
language sql stable set search_path = pg_catalog, pg_temp as $$
    select w.kind, w.leaf_at
    from (
        select 'publication', p_now + n * interval '6 hours', n from generate_series(0, 1) n
        union all
        select 'near', p_now + n * interval '6 hours', n from generate_series(0, 12) n
        union all
        select 'month', (date_trunc('month', p_now at time zone 'UTC') + n * interval '1 month') at time zone 'UTC', n * 100
        from generate_series(0, 12) n
    ) w (kind, leaf_at, place)
    cross join lateral postroad_broker.scheduled_leaf_of(w.kind, w.leaf_at) o
    where exists (select from postroad_broker.scheduled_stream)
        and not exists (select from postroad_broker.scheduled_leaf l where l.kind = w.kind and l.first_at = o.first_at)
    order by w.place, w.kind
$$;

-- Makes the leaf that a time falls into, if it is missing. DDL, so never under a head's lock: and one for each call, so that each
-- transaction has few locks.
create function postroad_broker.extend_scheduled(p_kind text, p_time timestamptz) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '2s'
as $$
declare
    v_leaf record;
    v_parent text := case p_kind when 'publication' then 'scheduled_publication' else 'scheduled_' || p_kind end;
    v_name text;
begin
    select o.first_at, o.last_at into v_leaf from postroad_broker.scheduled_leaf_of(p_kind, p_time) o;
    v_name := format('%s_%s', v_parent, to_char(v_leaf.first_at at time zone 'UTC', 'YYYYMMDDHH24'));
    -- Two makers: the second waits here for the first, and has nothing to do.
    insert into postroad_broker.scheduled_leaf (kind, first_at, last_at, table_name)
    values (p_kind, v_leaf.first_at, v_leaf.last_at, v_name)
    on conflict do nothing;
    if not found then
        return;
    end if;
    execute format(
        'create table postroad_broker.%I (like postroad_broker.%I including all) '
        'with (autovacuum_enabled = false, toast.autovacuum_enabled = false, toast_tuple_target = 4080)', v_name, v_parent);
    if p_kind <> 'publication' then
        execute format('alter table postroad_broker.%I alter column data set storage main', v_name);
    end if;
    execute format(
        'alter table postroad_broker.%I attach partition postroad_broker.%I for values from (%L) to (%L)',
        v_parent, v_name, v_leaf.first_at, v_leaf.last_at);
end
$$;

-- Empties a leaf whose time has been over for p_keep, if all of it is behind the horizons, and drops one that was emptied before.
-- Returns what it did: null is nothing. Fails at once, or after 50 ms, with lock_not_available when somebody is in the way.
--
-- The heads are locked first, then the leaf; what decides is looked at after that. A leaf of publications is left alone while one
-- of messages of its time is there, whose offsets it tells, and its last horizon goes into scheduled_stream. Months are remembered for no
-- longer than the leaves of 6 hours beside them (`scheduled_remembered`).
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
        where l.kind = 'near' and l.first_at <= p_first and l.emptied_at is null
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
    if p_kind <> 'publication' then
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

-- Deletes rows of no leaf that are behind their horizon and remembered no more, or whose stream is gone: p_max of a stream at most.
-- Returns how many. No scan ever looks before the horizon, so what a pinned snapshot keeps of them is in nobody's way.
create function postroad_broker.forget_scheduled(p_max integer) returns integer
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set enable_seqscan = off
set enable_bitmapscan = off
as $$
declare
    v_remembered timestamptz := postroad_broker.scheduled_remembered();
    v_stream integer;
    v_horizon record;
    v_until timestamptz;
    v_count integer;
    v_sum integer := 0;
begin
    select min(m.stream_id) into v_stream from postroad_broker.scheduled_rest m;
    while v_stream is not null loop
        select h.due_at, h.number into v_horizon from postroad_broker.scheduled_horizon(v_stream) h;
        v_until := least(v_remembered, v_horizon.due_at);
        if not exists (select from postroad_broker.scheduled_stream s where s.stream_id = v_stream) then
            v_until := 'infinity';
        end if;
        delete from postroad_broker.scheduled_rest m
        where m.ctid = any (array(
            select r.ctid from postroad_broker.scheduled_rest r
            where r.stream_id = v_stream and r.due_at < v_until
            order by r.due_at, r.number
            limit p_max));
        get diagnostics v_count = row_count;
        v_sum := v_sum + v_count;
        select min(m.stream_id) into v_stream from postroad_broker.scheduled_rest m where m.stream_id > v_stream;
    end loop;
    return v_sum;
end
$$;
