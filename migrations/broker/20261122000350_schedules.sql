-- Recurring publishing: the schedules, and the progress of each.

create table postroad_broker.schedule (
    id bigint generated always as identity primary key,
    name text not null unique,
    -- As declared: JSON text.
    declaration text not null,
    -- The cron expression, its zone, and whether it is paused: a change of these starts the schedule again.
    cadence text not null,
    is_paused boolean not null,
    -- Rises with each change.
    revision bigint not null default 1,
    created_at timestamptz not null default clock_timestamp(),
    changed_at timestamptz not null default clock_timestamp(),
    constraint schedule_name_is_valid check (name ~ '^[A-Za-z0-9_.-]{1,100}$')
);

-- Updated by each occurrence, so once in a second at most: few enough versions for a row this small.
create table postroad_broker.schedule_state (
    schedule_id bigint primary key references postroad_broker.schedule (id) on delete cascade,
    -- All occurrences up to here are dealt with: published, or left out by the misfire policy.
    through_at timestamptz not null,
    last_at timestamptz,
    published_count bigint not null default 0,
    -- Occurrences that were left out since their topic does not take the event: how many, the last of them, why, and when that was.
    failed_count bigint not null default 0,
    failed_at timestamptz,
    failure text,
    failure_at timestamptz
) with (fillfactor = 50);

-- Declares a schedule. It begins now: what would have been due before, or while it was paused, or by its former cadence, is not missed.
-- Statuses: created, changed, unchanged; full, when there are p_most of them.
create function postroad_broker.declare_schedule(
    p_name text, p_declaration text, p_cadence text, p_is_paused boolean, p_most bigint, p_witness timestamptz, out status text
)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_id bigint;
    v_row record;
begin
    perform from postroad_broker.schedule s where s.name = p_name;
    if not found and (select count(*) from postroad_broker.schedule) >= p_most then
        status := 'full';
        return;
    end if;
    insert into postroad_broker.schedule (name, declaration, cadence, is_paused)
    values (p_name, p_declaration, p_cadence, p_is_paused)
    on conflict (name) do nothing
    returning id into v_id;
    if v_id is not null then
        insert into postroad_broker.schedule_state (schedule_id, through_at) values (v_id, postroad_broker.agreed_clock(p_witness));
        status := 'created';
        return;
    end if;
    select s.id, s.declaration, s.cadence, s.is_paused into v_row
    from postroad_broker.schedule s where s.name = p_name for no key update;
    if not found or v_row.declaration = p_declaration then
        status := case when found then 'unchanged' else 'gone' end;
        return;
    end if;
    update postroad_broker.schedule s
    set declaration = p_declaration, cadence = p_cadence, is_paused = p_is_paused, revision = s.revision + 1,
        changed_at = clock_timestamp()
    where s.id = v_row.id;
    if v_row.cadence <> p_cadence or (v_row.is_paused and not p_is_paused) then
        update postroad_broker.schedule_state t set through_at = postroad_broker.agreed_clock(p_witness) where t.schedule_id = v_row.id;
    end if;
    status := 'changed';
end
$$;

-- Accepts occurrences as scheduled messages that are due now, and moves the schedule over them, in one transaction: each occurrence
-- is accepted by the one call that moves the schedule past it. The head is locked first, as an append does.
--
-- Arrays by occurrence, in their order. Statuses: fired; moved, the schedule has another revision or is elsewhere, or paused;
-- stale, the catalogue has another version than the stream was chosen by.
create function postroad_broker.fire_schedule(
    p_catalogue bigint,
    p_schedule bigint,
    p_revision bigint,
    p_from timestamptz,
    p_to timestamptz,
    p_stream integer,
    p_topic integer,
    o_id text[],
    o_time timestamptz[],
    p_key_hash bigint,
    p_key text,
    p_source text,
    p_type text,
    p_subject text,
    p_content_type text,
    p_schema text,
    p_extensions text,
    p_kind smallint,
    p_priority smallint,
    p_data bytea,
    p_witness timestamptz,
    out status text
)
language plpgsql volatile set search_path = pg_catalog, pg_temp set lock_timeout = '3s' as $$
declare
    v_wait text;
    v_clock timestamptz;
    v_due timestamptz;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'fire_schedule must run at read committed' using errcode = 'invalid_transaction_state';
    end if;
    status := 'stale';
    perform from postroad_broker.stream_head h where h.stream_id = p_stream for no key update;
    if not found then
        return;
    end if;
    v_wait := set_config('lock_timeout', '200ms', true);
    perform from postroad_broker.catalogue c where c.version = p_catalogue;
    if not found then
        return;
    end if;
    status := 'moved';
    -- The schedule first: a declare has locked it before the state.
    perform from postroad_broker.schedule s
    where s.id = p_schedule and s.revision = p_revision and not s.is_paused
    for share;
    if not found then
        return;
    end if;
    update postroad_broker.schedule_state t
    set through_at = p_to, last_at = coalesce(o_time[cardinality(o_time)], t.last_at),
        published_count = t.published_count + cardinality(o_id)
    where t.schedule_id = p_schedule and t.through_at = p_from;
    if not found then
        return;
    end if;
    v_clock := postroad_broker.agreed_clock(p_witness);
    select greatest(v_clock, h.due_at) into v_due from postroad_broker.scheduled_horizon(p_stream) h;
    insert into postroad_broker.scheduled_stream (stream_id) values (p_stream) on conflict (stream_id) do nothing;
    insert into postroad_broker.scheduled_message (
        tier, stream_id, due_at, number, topic_id, key_hash, key, id, source, type, subject, event_time, data_content_type,
        data_schema, extensions, data_kind, priority, data, accepted_at
    )
    select (postroad_broker.scheduled_tiers(array[v_due]))[1], p_stream, v_due, nextval('postroad_broker.scheduled_number'), p_topic, p_key_hash, p_key, o.id, p_source, p_type,
        p_subject, o.time, p_content_type, p_schema, p_extensions, p_kind, p_priority, p_data, v_clock
    from (
        select u.id, u.time from unnest(o_id, o_time) with ordinality as u (id, time, place) order by u.place
    ) o;
    status := 'fired';
end
$$;

-- Moves a schedule over occurrences that are left out; with a failure, which was p_failed_at's, it keeps why. Without moving it, that is
-- all it does. Statuses: passed; moved, as above.
create function postroad_broker.pass_schedule(
    p_schedule bigint,
    p_revision bigint,
    p_from timestamptz,
    p_to timestamptz,
    p_failed bigint,
    p_failed_at timestamptz,
    p_failure text,
    out status text
)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    status := 'moved';
    perform from postroad_broker.schedule s
    where s.id = p_schedule and s.revision = p_revision and not s.is_paused
    for share;
    if not found then
        return;
    end if;
    update postroad_broker.schedule_state t
    set through_at = p_to, failed_count = t.failed_count + p_failed,
        failed_at = coalesce(p_failed_at, t.failed_at), failure = coalesce(p_failure, t.failure),
        failure_at = case when p_failure is null then t.failure_at else clock_timestamp() end
    where t.schedule_id = p_schedule and t.through_at = p_from;
    if found then
        status := 'passed';
    end if;
end
$$;
