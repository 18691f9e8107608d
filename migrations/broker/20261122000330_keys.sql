-- Keyed streams: each key's version, which is how many messages it has had in the stream, and the way to its history.
--
-- Messages since the last fold are counted in the memory of each node, so that an append pays nothing here. A full leaf is
-- folded: it gets an index by key, and its counts go into `key_head`. Both stay right when nobody remembers anything: a node that
-- starts reads the keys after `stream_head.keys_through`, which is a part of the open leaf.

-- By stream and key: what the messages up to the stream's `keys_through` came to. Outlives the messages. By the key itself and not by
-- its hash, so that two keys of one hash have two versions.
create table postroad_broker.key_head (
    stream_id integer not null,
    key text collate "C" not null,
    version bigint not null,
    last_offset bigint not null,
    primary key (stream_id, key),
    constraint key_head_version_positive check (version > 0)
) partition by list (stream_id);

-- Makes a stream keyed that has had no message. False when it has had some: their keys were never counted.
create function postroad_broker.create_stream_keys(p_stream integer) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_name text := 'key_head_' || p_stream;
    v_is_used boolean;
begin
    -- As an append does, so that none comes in between.
    perform from postroad_broker.stream_head h where h.stream_id = p_stream for no key update;
    select h.floor > 0 or (select t.top is not null from postroad_broker.stream_last(p_stream) t) into v_is_used
    from postroad_broker.stream_head h where h.stream_id = p_stream;
    if v_is_used then
        return false;
    end if;
    -- Rows of a key that is written often change once per leaf: room for that beside them.
    execute format(
        'create table postroad_broker.%I (like postroad_broker.key_head including all) with (fillfactor = 80)', v_name);
    execute format(
        'alter table postroad_broker.key_head attach partition postroad_broker.%I for values in (%s)', v_name, p_stream);
    update postroad_broker.stream_head h set keys_through = 0 where h.stream_id = p_stream;
    return true;
end
$$;

-- Makes a keyed stream that has had no message an ordinary one again. False when it has had some.
create function postroad_broker.drop_stream_keys(p_stream integer) returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_is_used boolean;
begin
    perform from postroad_broker.stream_head h where h.stream_id = p_stream for no key update;
    select h.floor > 0 or (select t.top is not null from postroad_broker.stream_last(p_stream) t) into v_is_used
    from postroad_broker.stream_head h where h.stream_id = p_stream;
    if v_is_used then
        return false;
    end if;
    execute format('drop table postroad_broker.%I', 'key_head_' || p_stream);
    update postroad_broker.stream_head h set keys_through = null where h.stream_id = p_stream;
    return true;
end
$$;

-- Folds the keys of a leaf into their heads, and indexes it when it is full. Returns up to which offset all is folded; null when the
-- leaf is gone or its turn has not come. Leaves are folded in the order of their offsets. One that is not full is folded only before
-- retention empties it.
--
-- The leaf's row keeps two that fold it apart. The head's row is locked for the last moment only: what an append finds in `key_head`
-- under that lock belongs to the `keys_through` that it finds there.
create function postroad_broker.fold_keys(p_stream integer, p_first bigint) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_name text;
    v_last bigint;
    v_after bigint;
    v_top bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'fold_keys must run at read committed' using errcode = 'invalid_transaction_state';
    end if;
    select l.table_name, l.last_offset into v_name, v_last
    from postroad_broker.message_leaf l
    where l.stream_id = p_stream and l.first_offset = p_first and l.emptied_at is null
    for no key update;
    if not found then
        return null;
    end if;
    select h.keys_through into v_after from postroad_broker.stream_head h where h.stream_id = p_stream;
    if v_after is null or v_after < p_first - 1 then
        return null;
    end if;
    execute format(
        'select m."offset" from postroad_broker.%I m where m.stream_id = $1 order by m."offset" desc limit 1', v_name)
    into v_top using p_stream;
    if v_top = v_last then
        -- A full leaf takes no more appends, which is what this would keep out.
        execute format(
            'create index if not exists %I on postroad_broker.%I (key_hash, "offset") where key_hash is not null',
            v_name || '_by_key', v_name);
    end if;
    if v_top is null or v_top <= v_after then
        return v_after;
    end if;
    execute format(
        'insert into postroad_broker.key_head as h (stream_id, key, version, last_offset) '
        'select $1, m.key collate "C", count(*), max(m."offset") from postroad_broker.%I m '
        'where m.stream_id = $1 and m."offset" > $2 and m."offset" <= $3 and m.key is not null '
        'group by m.key collate "C" order by m.key collate "C" '
        'on conflict (stream_id, key) do update '
        'set version = h.version + excluded.version, last_offset = excluded.last_offset', v_name)
    using p_stream, v_after, v_top;
    update postroad_broker.stream_head h set keys_through = v_top
    where h.stream_id = p_stream and h.keys_through = v_after;
    if not found then
        raise exception 'stream % was folded by two at once', p_stream;
    end if;
    return v_top;
end
$$;
