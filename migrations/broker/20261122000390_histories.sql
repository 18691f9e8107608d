-- The histories of this database. A standby that is promoted, or a dump that is loaded into another server, can lack the last of
-- what was answered, and goes on with other messages at the same offsets. So a change of hands begins another history, with a number
-- and a salt of its own, and each stream's messages belong to the one in which they were appended: their receipts are made with its
-- salt, and a receipt for a message that was lost settles no other one.
--
-- A copy of the data folder that is put back and started as it is has the system identifier and the timeline that it had; a process
-- that runs knows it by its own heartbeat (node.beat), one that starts cannot.

create table postroad_broker.history (
    era bigint primary key,
    system_identifier text not null,
    timeline integer not null,
    database_oid bigint not null,
    salt uuid not null default gen_random_uuid(),
    began_at timestamptz not null default clock_timestamp(),
    constraint history_era_positive check (era > 0)
);

-- The offset where each stream continued in a history, except for the first history.
create table postroad_broker.stream_history (
    stream_id integer not null references postroad_broker.stream (id) on delete cascade,
    era bigint not null references postroad_broker.history (era),
    first_offset bigint not null,
    primary key (stream_id, era)
);

-- The history that this database is in, begun if it is another than the last one noted, or if that one is void: a process that
-- found out that the database went back in time names those that it knew, by their salts. All of them, since the copy that was put back
-- can be in an earlier one than the last: what was answered in that one after the copy was made is lost as well. Called by each process that starts, before it
-- reads or writes anything else. Then no node of the former history lives any more, streams go on behind what they have, and
-- numbers of nodes and queues that the former history may have given are left out: they are in receipts and in the log of groups.
-- Locks: the histories, nodes, heads.
create function postroad_broker.begin_history(void_salts uuid[]) returns table (found_era bigint, found_salt uuid, is_begun boolean)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    system_now text := (select c.system_identifier::text from pg_control_system() c);
    timeline_now integer := ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer;
    database_now bigint := (select d.oid::bigint from pg_database d where d.datname = current_database());
    last record;
    next_era bigint;
    v_stream integer;
    v_first bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'begin_history needs read committed';
    end if;
    select h.* into last from postroad_broker.history h order by h.era desc limit 1;
    if found and (last.system_identifier, last.timeline, last.database_oid) = (system_now, timeline_now, database_now)
        and last.salt <> all (void_salts)
    then
        return query select last.era, last.salt, false;
        return;
    end if;
    lock table postroad_broker.history in share row exclusive mode;
    -- Somebody else may have begun it meanwhile.
    select h.* into last from postroad_broker.history h order by h.era desc limit 1;
    if found and (last.system_identifier, last.timeline, last.database_oid) = (system_now, timeline_now, database_now)
        and last.salt <> all (void_salts)
    then
        return query select last.era, last.salt, false;
        return;
    end if;
    next_era := coalesce(last.era, 0) + 1;
    insert into postroad_broker.history (era, system_identifier, timeline, database_oid)
        values (next_era, system_now, timeline_now, database_now);
    if next_era > 1 then
        perform from postroad_broker.node n where n.dead_at is null order by n.incarnation for no key update;
        update postroad_broker.node n set dead_at = clock_timestamp() where n.dead_at is null;
        perform setval(s.name, nextval(s.name) + 1000000) from (values
            (pg_get_serial_sequence('postroad_broker.node', 'incarnation')),
            (pg_get_serial_sequence('postroad_broker.queue', 'id'))) s (name);
        perform from postroad_broker.stream_head h order by h.stream_id for no key update;
        for v_stream in select h.stream_id from postroad_broker.stream_head h order by h.stream_id loop
            -- Undone when it is known, and with it the locks of the leaves that were looked at: those of thousands of streams would
            -- fill the server's table of locks.
            begin
                select greatest(h.floor, t.top, 0) + 1 into v_first
                from postroad_broker.stream_head h, postroad_broker.stream_last(v_stream) t where h.stream_id = v_stream;
                raise exception 'looked' using errcode = 'PR001';
            exception when sqlstate 'PR001' then
                null;
            end;
            insert into postroad_broker.stream_history (stream_id, era, first_offset) values (v_stream, next_era, v_first);
        end loop;
    end if;
    return query select h.era, h.salt, next_era > 1 from postroad_broker.history h where h.era = next_era;
end $$;
