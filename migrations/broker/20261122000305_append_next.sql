-- As append, for what most groups are: messages of one stream, at once, after another group of the same appender there. It knows
-- the last offset of that group, and needs no look for the top of the log, which took a quarter of the time of a small append.
--
-- Why the offsets are right. The group `p_after` is in the journal, so this database has all that was committed before it: it is no
-- older copy, and the log has p_last. The floor is before p_last, so neither it nor what is behind it was dropped. If somebody appended
-- meanwhile, the primary key refuses the first row, and nothing is done.
--
-- Statuses: appended; other (for `append` to decide: nothing is done). What is not an append for sure is other, and so is whatever
-- would refuse somebody: a relay that was fenced or moved on, an id that was used, another catalogue, a group that is too old.
-- Only for the first try of a group. A call that was given up may still run after its repetition: then the offsets are taken, or
-- the key of the journal refuses the number.
--
-- An array that is a parameter of a function in PL/pgSQL is kept unpacked, so an element is at hand. Fifteen arrays unnested beside each
-- other are copied into fifteen stores first: a quarter of the time of an insert of many messages, and of one.
--
-- Locks and statements follow the order of `append`, for the same reasons, and plans are kept as there. r_ is the relay of the group,
-- null without one; m_ are the messages.
create function postroad_broker.append_next(
    p_incarnation bigint,
    p_number bigint,
    p_born_at timestamptz,
    p_catalogue bigint,
    p_after bigint,
    p_after_born_at timestamptz,
    p_stream integer,
    p_last bigint,
    p_last_at timestamptz,
    p_checks_ids boolean,
    r_lease text,
    r_epoch bigint,
    r_origin integer,
    r_from bigint,
    r_to bigint,
    r_position text,
    m_topic integer[],
    m_key_hash bigint[],
    m_key text[],
    m_id text[],
    m_source text[],
    m_type text[],
    m_subject text[],
    m_time timestamptz[],
    m_content_type text[],
    m_schema text[],
    m_extensions text[],
    m_kind smallint[],
    m_priority smallint[],
    m_data bytea[],
    m_origin integer[],
    m_identity uuid[],
    m_content uuid[],
    p_witness timestamptz,
    out status text,
    out clock timestamptz,
    out appended_at timestamptz
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
set plan_cache_mode = force_generic_plan
set lock_timeout = '3s'
set enable_seqscan = off
as $$
#variable_conflict use_column
declare
    v_floor bigint;
    v_is_so boolean;
    v_segment smallint;
    v_wait text;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'append must run at read committed' using errcode = 'invalid_transaction_state';
    end if;
    status := 'other';

    if r_lease is not null then
        perform from postroad_broker.lease l
        where l.name = r_lease and l.epoch = r_epoch and l.holder = p_incarnation for no key update;
        if not found then
            return;
        end if;
    end if;
    select h.floor into v_floor from postroad_broker.stream_head h where h.stream_id = p_stream for no key update;
    v_wait := set_config('lock_timeout', '100ms', true);
    clock := clock_timestamp();
    if v_floor is null or v_floor >= p_last
        or p_born_at not between clock - interval '5 minutes' and clock + interval '5 minutes'
        -- Nobody knows the time.
        or p_witness not between clock - interval '1 minute' and clock + interval '1 minute'
    then
        return;
    end if;

    select c.version = p_catalogue
        and exists (
            select from postroad_broker.append_journal j
            where j.bucket = postroad_broker.ten_minutes(p_after_born_at) % 4
                and j.incarnation = p_incarnation and j.number = p_after
        )
        and (r_lease is null or r_from = greatest(
            (
                select j.number from postroad_broker.relay_journal_0 j
                where j.origin_id = r_origin order by j.number desc limit 1
            ),
            (
                select j.number from postroad_broker.relay_journal_1 j
                where j.origin_id = r_origin order by j.number desc limit 1
            ),
            (select k.number from postroad_broker.relay_checkpoint k where k.origin_id = r_origin),
            0
        )),
        -- Nobody turns it while the relay's lease is locked. By its key: other scans are switched off.
        case when r_lease is not null then (select t.segment from postroad_broker.relay_turn t where t.singleton) end
    into v_is_so, v_segment
    from postroad_broker.catalogue c;
    if v_is_so is distinct from true then
        return;
    end if;
    if p_checks_ids then
        perform from unnest(m_identity) as m (identity)
        join postroad_broker.recent_id i on i.identity = m.identity;
        if found then
            return;
        end if;
    end if;

    appended_at := greatest(clock, p_last_at);
    insert into postroad_broker.message (
        stream_id, "offset", topic_id, key_hash, appended_at, key, id, source, type, subject, event_time,
        data_content_type, data_schema, extensions, data_kind, priority, data, origin_id
    )
    select p_stream, p_last + i, m_topic[i], m_key_hash[i], appended_at, m_key[i], m_id[i], m_source[i], m_type[i], m_subject[i],
        m_time[i], m_content_type[i], m_schema[i], m_extensions[i], m_kind[i], m_priority[i], m_data[i], m_origin[i]
    from generate_series(1, cardinality(m_topic)) as i;
    if p_checks_ids then
        insert into postroad_broker.recent_id (bucket, identity, content, "offset")
        select postroad_broker.half_day(clock) % 5, m.identity, m.content, p_last + m.place
        from unnest(m_identity, m_content) with ordinality as m (identity, content, place)
        where m.identity is not null;
    end if;
    if r_lease is not null then
        -- Into the segment itself: the way through the whole journal cost a quarter of the insert.
        if v_segment = 0 then
            insert into postroad_broker.relay_journal_0 (segment, origin_id, number, epoch, position, appended_at)
            values (v_segment, r_origin, r_to, r_epoch, r_position, clock);
        else
            insert into postroad_broker.relay_journal_1 (segment, origin_id, number, epoch, position, appended_at)
            values (v_segment, r_origin, r_to, r_epoch, r_position, clock);
        end if;
    end if;
    insert into postroad_broker.append_journal (
        bucket, incarnation, number, stream_first, stream_at, refused_member, refused_found,
        seen_message, seen_offset, seen_conflict, conflict_message, conflict_version, seen_due, scheduled_number
    ) values (
        postroad_broker.ten_minutes(p_born_at) % 4, p_incarnation, p_number, array[p_last + 1], array[appended_at],
        '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}'
    );
    status := 'appended';
end
$$;
