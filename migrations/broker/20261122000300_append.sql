-- Appending: the one function that writes the log.

-- One group commit: everything that one appender gathered, in one statement that commits by itself. Called at read
-- committed, outside of any transaction, so that a node that stops half-way leaves no lock behind.
--
-- Locks, in the order that all of Postroad follows: leases by name, then heads of streams by id. Each later statement has a
-- snapshot of its own, younger than the wait for the locks: it sees all that was appended before. (In one statement with
-- CTEs the snapshot would be older than the wait, and two appends would take the same offsets.)
--
-- For leases and heads it waits in line, as long as commits of others take. What it waits for after that is a lock that somebody has on a
-- table, which it gives up in a moment: others wait for the heads.
--
-- Leases are locked FOR NO KEY UPDATE, not FOR SHARE: a relay's lease has one writer, so sharing gains nothing, and two
-- sharers would cost a multixact each time. Either keeps out a taker, who updates the row.
--
-- Arrays, 1-based: s_ by stream, r_ by relay member, j_ by rejected row, m_ by message in the order of their offsets.
-- m_stream is a place in s_, j_relay one in r_; m_rank counts from 0 within the stream; m_identity and m_content are null
-- where ids are not checked. m_due is when a message is to enter the stream, null at once, empty when all are: what is due later is
-- kept as scheduled, and scheduled_number has its number at its place, empty when nothing is.
--
-- Messages of keyed streams that expect a version: k_ by key that some of them name, x_ by message of such a key, expecting or not,
-- in the order of m_. A key's version is what key_head has through s_base, and k_count after that through s_counted (-1 for streams
-- that none of this is about), and what others appended since, which is looked at here. x_expected is -1 where nothing is expected,
-- x_seq where the message is no outbox row. A published member goes by all of its expectations, an outbox row by its own.
--
-- Statuses: appended; stale (the catalogue has another version: nothing done); expired (p_born_at is too far from the clock
-- to find this group's result again: nothing done); behind (the keys were counted from another base than key_head has by now,
-- or far from the log's end: nothing done). A refused member's found is null when fenced, else the latest position.
--
-- p_witness is the node's clock: by `agreed_clock` messages bear their time, are due, and have their ids kept. `clock` is the server's.
create function postroad_broker.append(
    p_incarnation bigint,
    p_number bigint,
    p_born_at timestamptz,
    p_is_repeat boolean,
    p_catalogue bigint,
    p_checks_ids boolean,
    s_id integer[],
    s_hint bigint[],
    r_member integer[],
    r_lease text[],
    r_epoch bigint[],
    r_origin integer[],
    r_from bigint[],
    r_to bigint[],
    r_position text[],
    j_relay integer[],
    j_seq bigint[],
    j_reason text[],
    j_row text[],
    m_member integer[],
    m_stream integer[],
    m_rank integer[],
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
    s_base bigint[],
    s_counted bigint[],
    k_stream integer[],
    k_key text[],
    k_count bigint[],
    x_message integer[],
    x_key integer[],
    x_expected bigint[],
    x_seq bigint[],
    x_row text[],
    m_due timestamptz[],
    p_witness timestamptz,
    out status text,
    out clock timestamptz,
    out stream_first bigint[],
    out stream_at timestamptz[],
    out refused_member integer[],
    out refused_found bigint[],
    out seen_message integer[],
    out seen_offset bigint[],
    out seen_conflict boolean[],
    out conflict_message integer[],
    out conflict_version bigint[],
    out seen_due timestamptz[],
    out scheduled_number bigint[]
)
language plpgsql volatile
set search_path = pg_catalog, pg_temp
-- Kept plans: with the lengths of the arrays in hand the planner takes plans made for them to be better, and makes them anew in
-- every group.
set plan_cache_mode = force_generic_plan
set lock_timeout = '3s'
set enable_seqscan = off
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    v_at timestamptz;
    v_is_apart boolean := false;
    v_wait text;
    v_tier smallint[];
    v_bucket smallint := postroad_broker.ten_minutes(p_born_at) % 4;
    v_rank integer[] := m_rank;
    v_refused integer[] := '{}';
    v_count bigint;
    v_version bigint;
    v_floor bigint;
    v_floor_at timestamptz;
    v_top bigint;
    v_top_at timestamptz;
    v_keys_through bigint;
    v_versions bigint[];
    v_between jsonb;
    v_member integer;
    v_is_out boolean;
    v_taken integer[] := '{}';
    v_left_out integer[] := '{}';
    v_left_at bigint[] := '{}';
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'append must run at read committed' using errcode = 'invalid_transaction_state';
    end if;

    if cardinality(r_lease) > 0 then
        perform from postroad_broker.lease l where l.name = any (r_lease) order by l.name for no key update;
    end if;
    perform from postroad_broker.stream_head h where h.stream_id = any (s_id) order by h.stream_id for no key update;
    get diagnostics v_count = row_count;
    v_wait := set_config('lock_timeout', '100ms', true);

    clock := clock_timestamp();
    v_at := clock;
    if p_witness not between clock - interval '1 minute' and clock + interval '1 minute' then
        v_is_apart := true;
        v_at := postroad_broker.agreed_time(clock, p_witness);
    end if;
    if p_is_repeat then
        select 'appended', j.stream_first, j.stream_at, j.refused_member, j.refused_found,
            j.seen_message, j.seen_offset, j.seen_conflict, j.conflict_message, j.conflict_version, j.seen_due,
            j.scheduled_number
        into status, stream_first, stream_at, refused_member, refused_found, seen_message, seen_offset, seen_conflict,
            conflict_message, conflict_version, seen_due, scheduled_number
        from postroad_broker.append_journal j
        where j.bucket = v_bucket and j.incarnation = p_incarnation and j.number = p_number;
        if found then
            return;
        end if;
    end if;
    -- Half of a bucket's period: what is written now is kept for as long at least.
    if p_born_at not between clock - interval '5 minutes' and clock + interval '5 minutes' then
        status := 'expired';
        return;
    end if;
    -- A declare locks every head after it has written the version: what came before it is in the log by now.
    select c.version into v_version from postroad_broker.catalogue c;
    if v_version <> p_catalogue or v_count <> cardinality(s_id) then
        status := 'stale';
        return;
    end if;

    refused_member := '{}';
    refused_found := '{}';
    if cardinality(r_lease) > 0 then
        select coalesce(array_agg(r.member), '{}'),
            coalesce(array_agg(case when r.is_held then r.latest end), '{}')
        into refused_member, refused_found
        from (
            select u.member, u.from_number, p.latest,
                coalesce(l.epoch = u.epoch and l.holder = p_incarnation, false) as is_held
            from unnest(r_member, r_lease, r_epoch, r_origin, r_from)
                as u (member, lease, epoch, origin, from_number)
            left join postroad_broker.lease l on l.name = u.lease
            cross join lateral (
                select greatest(
                    (
                        select j.number from postroad_broker.relay_journal_0 j
                        where j.origin_id = u.origin order by j.number desc limit 1
                    ),
                    (
                        select j.number from postroad_broker.relay_journal_1 j
                        where j.origin_id = u.origin order by j.number desc limit 1
                    ),
                    (select k.number from postroad_broker.relay_checkpoint k where k.origin_id = u.origin),
                    0
                ) as latest
            ) p
        ) r
        where not r.is_held or r.latest <> r.from_number;
        v_refused := refused_member;
    end if;

    seen_message := '{}';
    seen_offset := '{}';
    seen_conflict := '{}';
    seen_due := '{}';
    if p_checks_ids then
        select coalesce(array_agg(s.place order by s.place), '{}'),
            coalesce(array_agg(s.first_use order by s.place), '{}'),
            coalesce(array_agg(s.is_conflict order by s.place), '{}'),
            coalesce(array_agg(s.due_at order by s.place), '{}'),
            v_refused || coalesce(array_agg(distinct s.member) filter (where s.is_conflict), '{}')
        into seen_message, seen_offset, seen_conflict, seen_due, v_refused
        from (
            -- It can be in two buckets.
            select distinct on (u.place) u.place::integer as place, u.member, i."offset" as first_use, i.due_at,
                i.content <> u.content as is_conflict
            from unnest(m_identity, m_content, m_member) with ordinality as u (identity, content, member, place)
            join postroad_broker.recent_id i on i.identity = u.identity
            order by u.place
        ) s;
    end if;

    scheduled_number := '{}';
    if cardinality(m_due) > 0 then
        scheduled_number := postroad_broker.number_scheduled(
            v_at, s_id, m_member, m_stream, m_due, v_refused, seen_message);
    end if;

    stream_first := '{}';
    stream_at := '{}';
    for s in 1..cardinality(s_id) loop
        select h.floor, h.floor_appended_at, h.keys_through into v_floor, v_floor_at, v_keys_through
        from postroad_broker.stream_head h where h.stream_id = s_id[s];
        select t.top, t.top_at into v_top, v_top_at
        from postroad_broker.stream_top(s_id[s], greatest(s_hint[s], v_floor + 1)) t;
        if v_top is null and v_floor < s_hint[s] then
            -- The hint is beyond the log: this database is an older copy of the one that gave it.
            select t.top, t.top_at into v_top, v_top_at from postroad_broker.stream_last(s_id[s]) t;
        end if;
        stream_first[s] := greatest(v_top, v_floor) + 1;
        stream_at[s] := greatest(v_at, v_top_at, v_floor_at);
        if s_base[s] >= 0
            and (v_keys_through is distinct from s_base[s]
                or stream_first[s] - 1 not between s_counted[s] and s_counted[s] + 10000)
        then
            status := 'behind';
            return;
        end if;
    end loop;

    conflict_message := '{}';
    conflict_version := '{}';
    if cardinality(x_message) > 0 then
        v_versions := array(
            select coalesce(h.version, 0) + k.count
            from unnest(k_stream, k_key, k_count) with ordinality as k (stream, key, count, place)
            left join postroad_broker.key_head h on h.stream_id = s_id[k.stream] and h.key = k.key
            order by k.place);
        for s in 1..cardinality(s_id) loop
            if s_base[s] >= 0 and s_counted[s] < stream_first[s] - 1 then
                execute 'select jsonb_object_agg(b.key, b.count) from ('
                    'select m.key, count(*) from postroad_broker.message m '
                    'where m.stream_id = $1 and m."offset" > $2 and m."offset" < $3 and m.key = any ($4) group by m.key) b'
                into v_between using s_id[s], s_counted[s], stream_first[s], k_key;
                v_versions := array(
                    select v.version + case when v.stream = s then coalesce((v_between ->> v.key)::bigint, 0) else 0 end
                    from unnest(v_versions, k_stream, k_key) with ordinality as v (version, stream, key, place)
                    order by v.place);
            end if;
        end loop;
        -- One after the other, since each message that goes in is a version further for those behind it. What a member took is
        -- given back when one of its expectations fails.
        for x in 1..cardinality(x_message) loop
            if m_member[x_message[x]] is distinct from v_member then
                v_member := m_member[x_message[x]];
                v_is_out := v_member = any (v_refused);
                v_taken := '{}';
            end if;
            -- What is scheduled is no version yet.
            continue when v_is_out or x_message[x] = any (seen_message) or scheduled_number[x_message[x]] is not null;
            if x_expected[x] = -1 or x_expected[x] = v_versions[x_key[x]] then
                v_versions[x_key[x]] := v_versions[x_key[x]] + 1;
                v_taken := v_taken || x_key[x];
                continue;
            end if;
            conflict_message := conflict_message || x_message[x];
            conflict_version := conflict_version || v_versions[x_key[x]];
            if x_seq[x] <> -1 then
                v_left_out := v_left_out || x_message[x];
                v_left_at := v_left_at || v_versions[x_key[x]];
            else
                foreach v_count in array v_taken loop
                    v_versions[v_count] := v_versions[v_count] - 1;
                end loop;
                v_refused := v_refused || v_member;
                v_is_out := true;
            end if;
        end loop;
    end if;

    if cardinality(scheduled_number) > 0 and cardinality(v_refused) > 0 then
        select array_agg(case when not m.member = any (v_refused) then m.number end order by m.place) into scheduled_number
        from unnest(m_member, scheduled_number) with ordinality as m (member, number, place);
    end if;

    if cardinality(v_refused) > 0 or cardinality(seen_message) > 0 or cardinality(v_left_out) > 0
        or cardinality(scheduled_number) > 0
    then
        -- Closes the ranks over what is left out.
        select array_agg(case when k.is_kept then k.rank end order by k.place) into v_rank
        from (
            select u.place, u.is_kept,
                (row_number() over (partition by u.stream, u.is_kept order by u.place) - 1)::integer as rank
            from (
                select m.place, m.stream,
                    m.number is null
                        and not (m.member = any (v_refused) or m.place = any (seen_message) or m.place = any (v_left_out))
                        as is_kept
                from unnest(m_member, m_stream, scheduled_number) with ordinality as m (member, stream, number, place)
            ) u
        ) k;
    end if;

    insert into postroad_broker.message (
        stream_id, "offset", topic_id, key_hash, appended_at, key, id, source, type, subject, event_time,
        data_content_type, data_schema, extensions, data_kind, priority, data, origin_id
    )
    select s_id[m.stream], stream_first[m.stream] + m.rank, m.topic, m.key_hash, stream_at[m.stream], m.key, m.id,
        m.source, m.type, m.subject, m.event_time, m.content_type, m.schema, m.extensions, m.kind, m.priority, m.data,
        m.origin
    from unnest(
        m_stream, v_rank, m_topic, m_key_hash, m_key, m_id, m_source, m_type, m_subject, m_time, m_content_type,
        m_schema, m_extensions, m_kind, m_priority, m_data, m_origin
    ) as m (
        stream, rank, topic, key_hash, key, id, source, type, subject, event_time, content_type,
        schema, extensions, kind, priority, data, origin
    )
    where m.rank is not null;

    if cardinality(scheduled_number) > 0 then
        insert into postroad_broker.scheduled_stream (stream_id)
        select distinct s_id[m.stream] from unnest(m_stream, scheduled_number) as m (stream, number)
        where m.number is not null
        on conflict (stream_id) do nothing;

        v_tier := postroad_broker.scheduled_tiers(m_due);
        insert into postroad_broker.scheduled_message (
            tier, stream_id, due_at, number, topic_id, key_hash, key, id, source, type, subject, event_time, data_content_type,
            data_schema, extensions, data_kind, priority, data, origin_id, accepted_at
        )
        select m.tier, s_id[m.stream], m.due, m.number, m.topic, m.key_hash, m.key, m.id, m.source, m.type, m.subject,
            m.event_time, m.content_type, m.schema, m.extensions, m.kind, m.priority, m.data, m.origin, v_at
        from unnest(
            v_tier, m_stream, m_due, scheduled_number, m_topic, m_key_hash, m_key, m_id, m_source, m_type, m_subject, m_time,
            m_content_type, m_schema, m_extensions, m_kind, m_priority, m_data, m_origin
        ) as m (
            tier, stream, due, number, topic, key_hash, key, id, source, type, subject, event_time,
            content_type, schema, extensions, kind, priority, data, origin
        )
        where m.number is not null;
    end if;

    if p_checks_ids then
        insert into postroad_broker.recent_id (bucket, identity, content, "offset", due_at)
        select postroad_broker.half_day(v_at) % 5, m.identity, m.content,
            coalesce(m.number, stream_first[m.stream] + m.rank), case when m.number is not null then m.due end
        from unnest(m_stream, v_rank, m_identity, m_content, scheduled_number, m_due)
            as m (stream, rank, identity, content, number, due)
        where (m.rank is not null or m.number is not null) and m.identity is not null;
        if v_is_apart then
            insert into postroad_broker.recent_id (bucket, identity, content, "offset", due_at)
            select b.bucket, i.identity, i.content, i."offset", i.due_at
            from postroad_broker.recent_id i
            cross join (
                select distinct postroad_broker.half_day(t.at) % 5 as bucket from unnest(array[clock, p_witness]) as t (at)
            ) b
            where i.bucket = postroad_broker.half_day(v_at) % 5 and i.identity = any (m_identity) and b.bucket <> i.bucket
            on conflict do nothing;
        end if;
    end if;

    if cardinality(r_lease) > 0 then
        insert into postroad_broker.relay_journal (segment, origin_id, number, epoch, position, appended_at)
        select (select t.segment from postroad_broker.relay_turn t), r.origin, r.to_number, r.epoch, r.position, clock
        from unnest(r_member, r_origin, r_to, r_epoch, r_position) as r (member, origin, to_number, epoch, position)
        where not r.member = any (v_refused);

        if cardinality(j_relay) > 0 then
            insert into postroad_broker.rejected_message (origin_id, seq, reason, outbox_row)
            select r_origin[j.relay], j.seq, j.reason, j.outbox_row
            from unnest(j_relay, j_seq, j_reason, j_row) as j (relay, seq, reason, outbox_row)
            where not r_member[j.relay] = any (v_refused);
        end if;

        if cardinality(v_left_out) > 0 then
            -- Only rows of relays that were not refused are left out, in the order of their messages.
            insert into postroad_broker.rejected_message (origin_id, seq, reason, outbox_row)
            select m_origin[l.message], l.seq,
                format('it expected version %s of its key, which is at %s', l.expected, v_left_at[l.place]), l.outbox_row
            from (
                select x.message, x.expected, x.seq, x.outbox_row, row_number() over (order by x.message) as place
                from unnest(x_message, x_expected, x_seq, x_row) as x (message, expected, seq, outbox_row)
                where x.message = any (v_left_out)
            ) l
            order by l.message;
        end if;
    end if;

    insert into postroad_broker.append_journal (
        bucket, incarnation, number, stream_first, stream_at, refused_member, refused_found,
        seen_message, seen_offset, seen_conflict, conflict_message, conflict_version, seen_due, scheduled_number
    ) values (
        v_bucket, p_incarnation, p_number, stream_first, stream_at, refused_member, refused_found,
        seen_message, seen_offset, seen_conflict, conflict_message, conflict_version, seen_due, scheduled_number
    );
    status := 'appended';
end
$$;
