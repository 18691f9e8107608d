-- The log's leaves: made ahead of their use, summarised when full, emptied when old, dropped when nobody looks.

-- The partition of a new stream. CREATE and ATTACH, since PARTITION OF would wait behind every reader of the log.
create function postroad_broker.create_stream_log(p_stream integer) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_name text := 'message_' || p_stream;
begin
    execute format(
        'create table postroad_broker.%I (like postroad_broker.message including all) partition by range ("offset")', v_name);
    execute format(
        'alter table postroad_broker.message attach partition postroad_broker.%I for values in (%s)', v_name, p_stream);
end
$$;

-- Makes leaves of p_size offsets until the log reaches p_through. Returns its end. The stream's row keeps two makers apart;
-- appends go on meanwhile. One statement per leaf, since it is DDL.
create function postroad_broker.extend_log(p_stream integer, p_through bigint, p_size bigint) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_last bigint;
    v_name text;
begin
    perform from postroad_broker.stream s where s.id = p_stream for no key update;
    if not found then
        return null;
    end if;
    select coalesce(
        (select max(l.last_offset) from postroad_broker.message_leaf l where l.stream_id = p_stream),
        (select h.floor from postroad_broker.stream_head h where h.stream_id = p_stream)
    ) into v_last;
    while v_last < p_through loop
        v_name := format('message_%s_%s', p_stream, v_last + 1);
        -- Rows of the log never change, so vacuum has nothing to do but freeze. Payloads up to a third of a page stay in
        -- the row: out of line they cost three times as much to write.
        execute format(
            'create table postroad_broker.%I (like postroad_broker.message including all) '
            'with (autovacuum_enabled = false, toast.autovacuum_enabled = false, toast_tuple_target = 4080)', v_name);
        execute format('alter table postroad_broker.%I alter column data set storage main', v_name);
        execute format(
            'alter table postroad_broker.%I attach partition postroad_broker.%I for values from (%s) to (%s)',
            'message_' || p_stream, v_name, v_last + 1, v_last + p_size + 1);
        insert into postroad_broker.message_leaf (stream_id, first_offset, last_offset, table_name)
        values (p_stream, v_last + 1, v_last + p_size, v_name);
        v_last := v_last + p_size;
    end loop;
    return v_last;
end
$$;

-- Writes down the topics of a full leaf, and that it was full by p_now.
create function postroad_broker.summarise_leaf(p_stream integer, p_first bigint, p_now timestamptz) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_name text;
begin
    update postroad_broker.message_leaf l set summarised_at = clock_timestamp(), noted_top = l.last_offset, noted_at = p_now
    where l.stream_id = p_stream and l.first_offset = p_first and l.summarised_at is null and l.emptied_at is null
    returning l.table_name into v_name;
    if found then
        execute format(
            'insert into postroad_broker.partition_topic '
            'select $1, $2, m.topic_id, count(*), min(m."offset"), max(m."offset") '
            'from postroad_broker.%I m group by m.topic_id', v_name)
        using p_stream, p_first;
    end if;
end
$$;

-- Empties the oldest leaf that still has messages, when its newest is old enough: p_settled if every queue has settled it
-- (p_watermark), p_unsettled whatever the queues say; null is never. p_is_over_settled and p_is_over_unsettled say that the
-- leaves behind this one alone have as many bytes as the stream is to keep, so that its age does not matter. Returns the offset up to which all is gone now, or null
-- when the leaf is too young, or -1 when its keys have to be folded first. Fails at once, with lock_not_available, when somebody
-- reads the leaf.
--
-- When the watermark was told is known by the node's clock, and by how long ago that is: a queue that went back since is told of by the
-- server's clock, which may have been set back or ahead meanwhile.
--
-- Messages that bear a time yet to come were appended by a clock that was ahead. They are as old as it is known that the leaf ends there.
--
-- The head is locked first, as an append does, then the leaf; what decides is looked at only after that, in new statements.
-- The leaf that is being filled may go too: the floor in the head keeps offsets going on.
create function postroad_broker.empty_leaf(
    p_stream integer,
    p_first bigint,
    p_now timestamptz,
    p_settled interval,
    p_unsettled interval,
    p_watermark bigint,
    p_watermark_at timestamptz,
    p_is_over_settled boolean,
    p_is_over_unsettled boolean
) returns bigint
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms'
as $$
declare
    -- Neither a jump of the server's clock nor one of the node's makes anything old before its time.
    v_now timestamptz := least(p_now, clock_timestamp());
    -- When the watermark was told, by the clock that queue.renewed_at is by: the age of the word is the same by every clock.
    v_told_at timestamptz := least(p_watermark_at, clock_timestamp() - (p_now - p_watermark_at));
    v_name text;
    v_last bigint;
    v_top bigint;
    v_top_at timestamptz;
    v_old_at timestamptz;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'empty_leaf must run at read committed' using errcode = 'invalid_transaction_state';
    end if;
    select l.table_name, l.last_offset into v_name, v_last
    from postroad_broker.message_leaf l where l.stream_id = p_stream and l.first_offset = p_first and l.emptied_at is null;
    if not found then
        return null;
    end if;
    -- A queue that was made or went back while the clock was far ahead did so by now at the latest. Its mark would keep everything until then.
    if exists (
        select from postroad_broker.queue q
        where q.stream_id = p_stream and q.renewed_at > greatest(p_now, clock_timestamp()) + interval '1 minute')
    then
        perform from postroad_broker.stream_head h where h.stream_id = p_stream for no key update;
        update postroad_broker.queue q set renewed_at = clock_timestamp()
        where q.stream_id = p_stream and q.renewed_at > greatest(p_now, clock_timestamp()) + interval '1 minute';
    end if;
    -- Once without locks, since most leaves are too young; then again under them.
    for attempt in 1..2 loop
        if attempt = 2 then
            perform from postroad_broker.stream_head h where h.stream_id = p_stream for no key update;
            execute format('lock table postroad_broker.%I in access exclusive mode nowait', v_name);
        end if;
        execute format(
            'select m."offset", m.appended_at from postroad_broker.%I m '
            'where m.stream_id = $1 order by m."offset" desc limit 1', v_name)
        into v_top, v_top_at using p_stream;
        v_old_at := v_top_at;
        if v_top_at > v_now then
            select l.noted_at into v_old_at from postroad_broker.message_leaf l
            where l.stream_id = p_stream and l.first_offset = p_first and l.noted_top = v_top and l.noted_at <= v_now;
            if not found then
                update postroad_broker.message_leaf l set noted_top = v_top, noted_at = v_now
                where l.stream_id = p_stream and l.first_offset = p_first;
            end if;
        end if;
        if v_top is null
            or not (
                ((p_is_over_settled or coalesce(v_old_at < v_now - p_settled, false)) and v_top <= p_watermark
                    -- A queue that has gone back since the watermark was told may want it. The margin is for the clocks.
                    and not exists (
                        select from postroad_broker.queue q
                        where q.stream_id = p_stream and q.renewed_at > v_told_at - interval '5 seconds'))
                or p_is_over_unsettled
                or coalesce(v_old_at < v_now - p_unsettled, false)
            )
        then
            return null;
        end if;
        -- The versions of its keys outlive its messages.
        if (select h.keys_through < v_top from postroad_broker.stream_head h where h.stream_id = p_stream) then
            return -1;
        end if;
    end loop;
    update postroad_broker.stream_head h set floor = v_top, floor_appended_at = least(v_top_at, v_now) where h.stream_id = p_stream;
    execute format('truncate postroad_broker.%I', v_name);
    delete from postroad_broker.partition_topic t where t.stream_id = p_stream and t.first_offset = p_first;
    if v_top = v_last then
        update postroad_broker.message_leaf l set emptied_at = clock_timestamp()
        where l.stream_id = p_stream and l.first_offset = p_first;
    end if;
    return v_top;
end
$$;

-- Drops an emptied leaf. Fails after 50 ms, with lock_not_available, behind anybody who has the stream's log open: its appends wait no
-- longer than that.
create function postroad_broker.drop_leaf(p_stream integer, p_first bigint) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms'
as $$
declare
    v_name text;
begin
    select l.table_name into v_name from postroad_broker.message_leaf l
    where l.stream_id = p_stream and l.first_offset = p_first and l.emptied_at is not null
    for update;
    if not found then
        return;
    end if;
    execute format('drop table if exists postroad_broker.%I', v_name);
    delete from postroad_broker.message_leaf l where l.stream_id = p_stream and l.first_offset = p_first;
    delete from postroad_broker.partition_topic t where t.stream_id = p_stream and t.first_offset = p_first;
end
$$;

-- One step of dropping the log of a deleted stream, each a transaction of few locks, however many leaves it has: p_leaves of its leaves
-- go at a time, at last what is left. The leaves first, and where they hang: to detach or drop a partition locks all that is below it.
-- Only the last step takes a lock of the log of all streams. Returns true once all is gone. Fails after 50 ms, with
-- lock_not_available, behind any session that has these tables open.
create function postroad_broker.drop_stream_log(p_stream integer, p_leaves integer) returns boolean
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms'
as $$
declare
    v_log regclass := to_regclass(format('postroad_broker.%I', 'message_' || p_stream));
    v_leaf text;
    v_first bigint;
    v_count integer := 0;
begin
    if exists (select from postroad_broker.stream s where s.id = p_stream) then
        raise exception 'stream % is not deleted', p_stream;
    end if;
    for v_leaf in
        select c.relname from pg_inherits i join pg_class c on c.oid = i.inhrelid
        where i.inhparent = v_log order by c.relname limit p_leaves
    loop
        execute format('drop table postroad_broker.%I', v_leaf);
        delete from postroad_broker.message_leaf l where l.stream_id = p_stream and l.table_name = v_leaf
        returning l.first_offset into v_first;
        delete from postroad_broker.partition_topic t where t.stream_id = p_stream and t.first_offset = v_first;
        v_count := v_count + 1;
    end loop;
    if v_count > 0 then
        return false;
    end if;
    execute format('drop table if exists postroad_broker.%I', 'message_' || p_stream);
    execute format('drop table if exists postroad_broker.%I', 'key_head_' || p_stream);
    delete from postroad_broker.message_leaf l where l.stream_id = p_stream;
    delete from postroad_broker.partition_topic t where t.stream_id = p_stream;
    return true;
end
$$;

-- Empties the bucket of recent ids and of append results that are out of date. Fails at once when somebody reads it. The
-- bucket is chosen after the lock is had. The next period's is left alone, for a clock that steps back over its boundary.
-- With more than a minute between the server's clock and a node's (p_witness) nobody knows what is out of date: nothing is emptied.
create function postroad_broker.rotate_buckets(p_witness timestamptz) returns void
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set lock_timeout = '50ms'
as $$
declare
    v_now timestamptz := clock_timestamp();
    v_table text;
    v_period text;
    v_has_rows boolean;
    v_is_now boolean;
begin
    if p_witness not between v_now - interval '1 minute' and v_now + interval '1 minute' then
        return;
    end if;
    for v_table, v_period in
        select * from (values
            ('recent_id_' || (postroad_broker.half_day(v_now) + 2) % 5, 'half_day'),
            ('append_journal_' || (postroad_broker.ten_minutes(v_now) + 2) % 4, 'ten_minutes')
        ) as due
    loop
        execute format('select exists (select from postroad_broker.%I)', v_table) into v_has_rows;
        if v_has_rows then
            execute format('lock table postroad_broker.%I in access exclusive mode nowait', v_table);
            -- Still the same period.
            execute format('select postroad_broker.%1$I($1) = postroad_broker.%1$I(clock_timestamp())', v_period)
                into v_is_now using v_now;
            if v_is_now then
                execute format('truncate postroad_broker.%I', v_table);
            end if;
        end if;
    end loop;
end
$$;
