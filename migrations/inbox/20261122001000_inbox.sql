-- The inbox: what a consumer's own database knows of the messages whose work is done. A consumer accepts a message in the
-- transaction of its work; a message that comes again finds its entry.
--
-- One message has one place: the leaf of its queue and of its offset, which never change, and the one unique index there. By time,
-- say, two leaves could each take the same message at the turn of the hour. The entries leave with their leaf, by TRUNCATE.

-- How long entries are kept at least, and how many offsets a leaf has. Shorter than a message can come back is too short: its
-- retention in the stream and then that of dead letters.
create table postroad.inbox_setting (
    singleton boolean primary key default true,
    keep interval not null default interval '30 days',
    leaf_offsets bigint not null default 1000000,
    constraint inbox_setting_is_one_row check (singleton),
    constraint inbox_setting_keep_is_positive check (keep >= interval '0'),
    constraint inbox_setting_leaf_offsets_are_positive check (leaf_offsets > 0)
);
insert into postroad.inbox_setting default values;

create table postroad.inbox (
    -- The queue that delivered it, or another name for one consumer's work: two that work on the same messages use two names.
    queue text collate "C" not null,
    "offset" bigint not null,
    source text not null,
    id text not null,
    accepted_at timestamptz not null default clock_timestamp(),
    constraint inbox_queue_is_1_to_100_bytes check (octet_length(queue) between 1 and 100),
    constraint inbox_offset_is_positive check ("offset" > 0),
    constraint inbox_source_is_1_to_1024_bytes check (octet_length(source) between 1 and 1024),
    constraint inbox_id_is_1_to_1024_bytes check (octet_length(id) between 1 and 1024)
) partition by range (queue, "offset");

-- Entries are never updated. Deleting some by hand works even where there is a publication for all tables.
alter table postroad.inbox replica identity full;

comment on table postroad.inbox is 'Messages whose work is done. Written by postroad.inbox_accept, in the transaction of the work.';

create sequence postroad.inbox_leaf_number as bigint;

-- The leaves, also those that left: a message of one of them can no longer be told from a new one, and is refused.
create table postroad.inbox_leaf (
    queue text collate "C" not null,
    first_offset bigint not null,
    last_offset bigint not null,
    table_name text not null unique,
    made_at timestamptz not null default clock_timestamp(),
    emptied_at timestamptz,
    dropped_at timestamptz,
    primary key (queue, first_offset),
    constraint inbox_leaf_not_empty check (last_offset >= first_offset)
);

-- Empties leaves whose newest entry is older than `keep`, oldest first, at most so many. Returns how many left. A leaf in use
-- is passed over. What decides is looked at once it is locked.
--
-- The leaf that is being filled stays, however old its entries are: a leaf is made when a message came to the middle of the one
-- before, so that with two later ones there, the queue is past it. The catalogue says so; a look into the whole inbox would wait
-- for a session that empties another queue's leaf.
--
-- A transaction that looked the leaf up before it left can still insert into it: hence the constraint, which holds whatever
-- snapshot that transaction has.
create function postroad.inbox_empty_leaves(p_queue text, p_max integer) returns integer
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_cutoff timestamptz := clock_timestamp() - (select s.keep from postroad.inbox_setting s);
    v_leaf record;
    v_is_needed boolean;
    v_count integer := 0;
begin
    for v_leaf in
        select l.queue, l.first_offset, l.last_offset, l.table_name from postroad.inbox_leaf l
        where l.emptied_at is null and l.made_at < v_cutoff and (p_queue is null or l.queue = p_queue)
            and (select count(*) from postroad.inbox_leaf n where n.queue = l.queue and n.first_offset > l.last_offset) >= 2
        order by l.made_at
    loop
        exit when v_count >= p_max;
        begin
            execute format('select exists (select from postroad.%I i where i.accepted_at >= $1)', v_leaf.table_name)
                into v_is_needed using v_cutoff;
            continue when v_is_needed;
            execute format('lock table postroad.%I in access exclusive mode nowait', v_leaf.table_name);
            execute format('select exists (select from postroad.%I i where i.accepted_at >= $1)', v_leaf.table_name)
                into v_is_needed using v_cutoff;
            continue when v_is_needed;
            update postroad.inbox_leaf l set emptied_at = clock_timestamp()
                where l.queue = v_leaf.queue and l.first_offset = v_leaf.first_offset and l.emptied_at is null;
            continue when not found;
            execute format('truncate postroad.%I', v_leaf.table_name);
            execute format('alter table postroad.%I add constraint inbox_message_is_not_too_old check (false)', v_leaf.table_name);
            v_count := v_count + 1;
        exception
            when lock_not_available then null;
        end;
    end loop;
    return v_count;
end
$$;

-- Makes the leaf of an offset, unless it is there. Waits for another transaction that is making one for the queue, or with
-- p_waits false leaves it to that one. ATTACH takes no lock that an insert waits for.
create function postroad.inbox_make_leaf(p_queue text, p_offset bigint, p_waits boolean) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_size bigint;
    v_first bigint;
    v_last bigint;
    v_name text;
begin
    if p_offset is null or p_offset < 1 or p_queue is null or octet_length(p_queue) not between 1 and 100 then
        raise exception 'a message has an offset from 1 on and a queue of 1 to 100 bytes' using errcode = 'invalid_parameter_value';
    end if;
    if p_waits then
        perform pg_advisory_xact_lock(1886548853, hashtext(p_queue));
    elsif not pg_try_advisory_xact_lock(1886548853, hashtext(p_queue)) then
        return;
    end if;
    if exists (
        select from postroad.inbox_leaf l where l.queue = p_queue and p_offset between l.first_offset and l.last_offset
    ) then
        return;
    end if;
    select s.leaf_offsets into v_size from postroad.inbox_setting s;
    v_first := (p_offset - 1) / v_size * v_size + 1;
    v_last := v_first + v_size - 1;
    -- Between its neighbours, which may have been made with another size.
    select greatest(v_first, max(l.last_offset) filter (where l.last_offset < p_offset) + 1),
        least(v_last, min(l.first_offset) filter (where l.first_offset > p_offset) - 1)
    into v_first, v_last
    from postroad.inbox_leaf l where l.queue = p_queue;
    v_name := 'inbox_' || nextval('postroad.inbox_leaf_number');
    insert into postroad.inbox_leaf (queue, first_offset, last_offset, table_name) values (p_queue, v_first, v_last, v_name)
        -- Only where the snapshot is older than the lock: then it is a serialization failure, as it should be.
        on conflict do nothing;
    -- Entries never change, so vacuum has nothing to do but freeze.
    execute format(
        'create table postroad.%I (like postroad.inbox including all) with (autovacuum_enabled = false, toast.autovacuum_enabled = false)',
        v_name);
    execute format('create unique index on postroad.%I (id, source)', v_name);
    execute format('alter table postroad.%I replica identity full', v_name);
    execute format(
        'alter table postroad.inbox attach partition postroad.%I for values from (%L, %s) to (%L, %s)',
        v_name, p_queue, v_first, p_queue, v_last + 1);
    -- As many leave as come, and one more.
    perform postroad.inbox_empty_leaves(p_queue, 2);
end
$$;

-- Accepts a message in the caller's transaction: true if it is new, and then the caller does its work, in the same
-- transaction; false if its work is done, and then there is nothing left but to acknowledge it. While another transaction has
-- accepted it and has not ended, the call waits for that one: committed is false, rolled back is true.
--
-- `source` and `id` are the event's, `offset` the delivery's. Owned by whoever installs it, so that a consumer's role needs no
-- right on any table: fixed search_path, no text of a caller's in a name.
--
-- Errors: object_not_in_prerequisite_state for a message so old that its leaf has left: it may be done or not, and nobody
-- knows. check_violation when the leaf leaves this moment. At repeatable read serialization_failure, where false would be the answer.
create function postroad.inbox_accept(queue text, source text, id text, "offset" bigint) returns boolean
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
#variable_conflict use_column
declare
    v_leaf record;
    v_count bigint;
begin
    for attempt in 1..2 loop
        select l.first_offset, l.last_offset, l.table_name, l.emptied_at into v_leaf
        from postroad.inbox_leaf l
        where l.queue = inbox_accept.queue and l.first_offset <= inbox_accept."offset"
        order by l.first_offset desc limit 1;
        exit when v_leaf.last_offset >= inbox_accept."offset";
        if attempt = 2 then
            raise exception 'the leaf of this message was made by a transaction that this one cannot see'
                using errcode = 'serialization_failure';
        end if;
        perform postroad.inbox_make_leaf(inbox_accept.queue, inbox_accept."offset", true);
    end loop;
    if v_leaf.emptied_at is not null then
        raise exception 'the inbox no longer knows whether message % of queue % was accepted', inbox_accept."offset", inbox_accept.queue
            using errcode = 'object_not_in_prerequisite_state',
                detail = format('The entries of offsets %s to %s left at %s.', v_leaf.first_offset, v_leaf.last_offset, v_leaf.emptied_at),
                hint = 'Find out from your own tables, then delete the message from the queue or do its work by hand.';
    end if;
    -- Into the leaf itself: for a moment after the leaf was committed, and for the rest of a transaction that has the inbox open
    -- already, this session would look for it among the partitions that it remembers, and not find it.
    execute format(
        'insert into postroad.%I (queue, source, id, "offset") values ($1, $2, $3, $4) on conflict do nothing', v_leaf.table_name)
        using inbox_accept.queue, inbox_accept.source, inbox_accept.id, inbox_accept."offset";
    get diagnostics v_count = row_count;
    -- The next leaf, ahead of its use: after the insert, so that who waits there does not hold the lock of who makes leaves.
    if inbox_accept."offset" > v_leaf.first_offset + (v_leaf.last_offset - v_leaf.first_offset) / 2 and not exists (
        select from postroad.inbox_leaf n where n.queue = inbox_accept.queue and n.first_offset = v_leaf.last_offset + 1
    ) then
        perform postroad.inbox_make_leaf(inbox_accept.queue, v_leaf.last_offset + 1, false);
    end if;
    return v_count = 1;
end
$$;

-- Empties old leaves of all queues, and drops emptied ones. Consumers do the first by themselves, each time that
-- they make a leaf; this is for who wants the tables gone too, or has set a shorter `keep`. It is for the owner: the drop needs the
-- whole inbox for a moment, gives up after 50 ms, and must not wait for the rest of some consumer's transaction. Returns how many
-- leaves left.
create function postroad.inbox_maintain() returns integer
language plpgsql volatile set search_path = pg_catalog, pg_temp set lock_timeout = '50ms' as $$
declare
    v_leaf record;
    v_count integer := postroad.inbox_empty_leaves(null, 1000);
begin
    for v_leaf in
        select l.queue, l.first_offset, l.table_name from postroad.inbox_leaf l
        where l.emptied_at is not null and l.dropped_at is null
    loop
        begin
            execute format('drop table postroad.%I', v_leaf.table_name);
            update postroad.inbox_leaf l set dropped_at = clock_timestamp()
                where l.queue = v_leaf.queue and l.first_offset = v_leaf.first_offset;
        exception
            when lock_not_available then exit;
        end;
    end loop;
    return v_count;
end
$$;

-- Forgets a queue: its entries, and what was known of its leaves. For one that is gone, before another takes its name.
create function postroad.inbox_forget(p_queue text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp set lock_timeout = '5s' as $$
declare
    v_name text;
begin
    for v_name in select l.table_name from postroad.inbox_leaf l where l.queue = p_queue and l.dropped_at is null loop
        execute format('drop table postroad.%I', v_name);
    end loop;
    delete from postroad.inbox_leaf l where l.queue = p_queue;
end
$$;

revoke all on function postroad.inbox_empty_leaves(text, integer), postroad.inbox_make_leaf(text, bigint, boolean),
    postroad.inbox_accept(text, text, text, bigint), postroad.inbox_maintain(), postroad.inbox_forget(text) from public;
