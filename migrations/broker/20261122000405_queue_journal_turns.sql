-- How the journal of queues turns from segment to segment, and how those go that every checkpoint is past.

-- Segments that every checkpoint is past, since when, and the first transaction that began after: a snapshot from before it has former
-- checkpoints, and needs the segment beside them. TRUNCATE takes its rows from every snapshot, however old.
create table postroad_broker.queue_journal_folded (
    segment smallint primary key,
    as_of xid8 not null,
    folded_at timestamptz not null default clock_timestamp()
);

-- Turns the journal to its next segment when the current one holds `full_bytes`, or anything for longer than
-- `full_after`; not while the next one still has rows. Returns the turn.
create function postroad_broker.turn_queue_journal(full_bytes bigint, full_after interval) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    turn_now bigint;
    turned timestamptz;
    size_now bigint;
begin
    select t.turn, t.turned_at into strict turn_now, turned from postroad_broker.queue_journal_turn t for update;
    -- With its TOAST, where entries of more than 2 kB are. It has some bytes also when it is empty.
    size_now := case pg_relation_size(format('postroad_broker.queue_journal_%s', turn_now % 4)::regclass)
        when 0 then 0 else pg_table_size(format('postroad_broker.queue_journal_%s', turn_now % 4)::regclass) end;
    if (size_now >= full_bytes or (size_now > 0 and clock_timestamp() - turned > full_after))
        and pg_relation_size(format('postroad_broker.queue_journal_%s', (turn_now + 1) % 4)::regclass) = 0
    then
        turn_now := turn_now + 1;
        update postroad_broker.queue_journal_turn set turn = turn_now, turned_at = clock_timestamp();
    end if;
    return turn_now;
end $$;

-- Truncates the segments that are not written and that every checkpoint is past, once no snapshot is left that has former checkpoints: a
-- dump by such a one would have those without what came after them. A session whose snapshot cannot be seen counts as one for a minute,
-- and one that is held counts for ten: what a forgotten transaction keeps is bounded. Returns how many still have rows. The
-- lock comes before the look: a group that chose the segment before the turn either is seen, or waits and inserts after.
-- Another look comes before the lock, which every group would wait for, and which is mostly not worth it.
create function postroad_broker.truncate_queue_journal() returns integer
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    turn_now bigint;
    left_count integer := 0;
    needed boolean;
    folded record;
    leaf text;
    look text;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'truncate_queue_journal needs read committed';
    end if;
    select t.turn into strict turn_now from postroad_broker.queue_journal_turn t for update;
    for closed in 0..3 loop
        leaf := format('postroad_broker.queue_journal_%s', closed);
        continue when closed = turn_now % 4 or pg_relation_size(leaf::regclass) = 0;
        look := format(
            'select exists (select from only %s j
                join postroad_broker.queue q on q.id = j.queue_id and q.generation = j.generation
                left join postroad_broker.queue_checkpoint c
                    on c.queue_id = j.queue_id and c.generation = j.generation
                where c.queue_id is null or (c.epoch, c.number) < (j.epoch, j.number))', leaf);
        execute look into needed;
        if needed then
            delete from postroad_broker.queue_journal_folded f where f.segment = closed;
            left_count := left_count + 1;
            continue;
        end if;
        insert into postroad_broker.queue_journal_folded (segment, as_of)
            values (closed, pg_snapshot_xmax(pg_current_snapshot())) on conflict (segment) do nothing;
        select f.as_of, clock_timestamp() - f.folded_at as since into strict folded
            from postroad_broker.queue_journal_folded f where f.segment = closed;
        if exists (
            select from pg_stat_activity a
            where a.datid = (select d.oid from pg_database d where d.datname = current_database()) and a.pid <> pg_backend_pid()
              and case when a.backend_xmin is not null
                then age(a.backend_xmin) > age(folded.as_of::xid) and folded.since < interval '10 minutes'
                else a.query = '<insufficient privilege>' and folded.since < interval '1 minute' end)
        then
            left_count := left_count + 1;
            continue;
        end if;
        begin
            execute format('lock table only %s in access exclusive mode nowait', leaf);
            execute look into needed;
            if needed then
                left_count := left_count + 1;
            else
                execute format('truncate only %s', leaf);
                delete from postroad_broker.queue_journal_folded f where f.segment = closed;
            end if;
        exception when lock_not_available then
            left_count := left_count + 1;
        end;
    end loop;
    return left_count;
end $$;
