-- Locks for users: leases by name, each with a fencing token that only ever rises.
--
-- A token is (era, number) in one bigint: number from a sequence, which never gives what it gave before, also after a crash. A
-- standby that is promoted can lack the last of what was given, and a dump read into another server begins a new history: there
-- the era rises, since system identifier or timeline are others than noted. Below 2^53, so that JSON keeps it.

create sequence postroad_broker.user_lock_number maxvalue 1099511627775 no cycle;

create table postroad_broker.user_lock_era (
    singleton boolean primary key default true,
    system_identifier text not null default '',
    timeline integer not null default 0,
    era bigint not null default 0,
    constraint user_lock_era_is_one_row check (singleton),
    constraint user_lock_era_in_range check (era < 8192)
);

insert into postroad_broker.user_lock_era default values;

-- A lock is held while it has an owner and its time is not up. Rows of free locks are deleted after a day.
create table postroad_broker.user_lock (
    name text collate "C" primary key,
    owner text,
    -- Of the present or the last holder; 0 before the first.
    token bigint not null default 0,
    acquired_at timestamptz,
    expires_at timestamptz not null default '-infinity',
    changed_at timestamptz not null default clock_timestamp()
) with (fillfactor = 50);

-- Who waits, in order of tickets. A place is kept for a while after its owner last asked, so that a long poll that ends, or a
-- node that does, does not lose it.
create table postroad_broker.user_lock_waiter (
    name text collate "C" not null,
    ticket bigint generated always as identity,
    owner text not null,
    since timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    primary key (name, ticket),
    constraint user_lock_waiter_has_one_place unique (name, owner)
) with (fillfactor = 50);

-- The era of this server's history, raised if it is another than noted. The timeline is the least: two standbys that were promoted
-- one after the other may both know the same noted one.
create function postroad_broker.user_lock_era() returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    system_now text := (select c.system_identifier::text from pg_control_system() c);
    timeline_now integer := ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::integer;
    found_era bigint;
begin
    select e.era into found_era from postroad_broker.user_lock_era e
        where e.system_identifier = system_now and e.timeline = timeline_now;
    if not found then
        update postroad_broker.user_lock_era e
            set system_identifier = system_now, timeline = timeline_now, era = greatest(e.era + 1, timeline_now)
            where (e.system_identifier, e.timeline) is distinct from (system_now, timeline_now);
        select e.era into found_era from postroad_broker.user_lock_era e;
    end if;
    return found_era;
end $$;

-- Takes locks, renews them, and queues up for them: one commit for all requests, in the order in which they came. A request with a
-- token renews: it gets the lock for longer if nobody took it since, also when its time was up. One without gets a free lock
-- unless somebody is before it in the line; the holder who asks again gets what it has, for longer. `waits`: with a place in the
-- line. One row per request, in the same order: who holds the lock now, and how many are in the line before. `clock` is the
-- database's, at which the times are judged.
create function postroad_broker.take_user_locks(
    names text[], owners text[], tokens bigint[], seconds double precision[], waits boolean[], place_seconds double precision
) returns table (
    held_by text, held_token bigint, held_since timestamptz, held_until timestamptz, places_before bigint, clock timestamptz
)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    clock_now timestamptz;
    era_now bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'take_user_locks needs read committed';
    end if;
    insert into postroad_broker.user_lock (name)
        select distinct n.name from unnest(names) n (name) order by n.name
        on conflict (name) do nothing;
    perform from postroad_broker.user_lock l where l.name = any (names) order by l.name for no key update;
    -- Times are judged once the rows are ours.
    clock_now := clock_timestamp();
    era_now := postroad_broker.user_lock_era();

    delete from postroad_broker.user_lock_waiter w where w.name = any (names) and w.expires_at <= clock_now;
    insert into postroad_broker.user_lock_waiter as w (name, owner, since, expires_at)
        select r.name, r.owner, clock_now, clock_now + make_interval(secs => place_seconds)
        from unnest(names, owners, tokens, waits) with ordinality r (name, owner, token, waits, n)
        join postroad_broker.user_lock l on l.name = r.name
        where r.waits and r.token is null and not (l.owner is not distinct from r.owner and l.expires_at > clock_now)
        order by r.n
        -- Not with each request: those who wait are asked for twice a second.
        on conflict (name, owner) do update set expires_at = excluded.expires_at
        where w.expires_at < clock_now + make_interval(secs => place_seconds / 2);

    update postroad_broker.user_lock l
        set owner = given.owner,
            token = case when given.keeps then l.token else (era_now << 40) | nextval('postroad_broker.user_lock_number') end,
            acquired_at = case when given.keeps then l.acquired_at else clock_now end,
            expires_at = clock_now + make_interval(secs => given.seconds),
            changed_at = clock_now
        from (
            select distinct on (r.name) r.name, r.owner, r.seconds, s.keeps
            from unnest(names, owners, tokens, seconds) with ordinality r (name, owner, token, seconds, n)
            join postroad_broker.user_lock h on h.name = r.name
            cross join lateral (
                select h.owner is not null and h.owner = r.owner
                    and (r.token = h.token or (r.token is null and h.expires_at > clock_now)) as keeps
            ) s
            left join lateral (
                select w.owner from postroad_broker.user_lock_waiter w where w.name = r.name order by w.ticket limit 1
            ) f on true
            where s.keeps
                or (r.token is null and (h.owner is null or h.expires_at <= clock_now) and coalesce(f.owner, r.owner) = r.owner)
            order by r.name, s.keeps desc, r.n
        ) given
        where l.name = given.name;

    delete from postroad_broker.user_lock_waiter w
        using postroad_broker.user_lock l
        where w.name = any (names) and l.name = w.name and l.owner = w.owner;

    return query
        select l.owner, l.token, l.acquired_at, l.expires_at,
            (
                select count(*) from postroad_broker.user_lock_waiter w
                where w.name = r.name and w.ticket < coalesce((
                    select o.ticket from postroad_broker.user_lock_waiter o where o.name = r.name and o.owner = r.owner
                ), 9223372036854775807)
            ),
            clock_now
        from unnest(names, owners) with ordinality r (name, owner, n)
        left join postroad_broker.user_lock l on l.name = r.name
        order by r.n;
end $$;

-- Gives locks back that are held under these tokens, and says which those were.
create function postroad_broker.release_user_locks(names text[], tokens bigint[]) returns setof text
language sql volatile set search_path = pg_catalog, pg_temp as $$
    update postroad_broker.user_lock l
    set owner = null, expires_at = clock_timestamp(), changed_at = clock_timestamp()
    from (
        -- In the order of names, as they are taken.
        select h.name, r.token
        from postroad_broker.user_lock h
        join unnest(names, tokens) r (name, token) on r.name = h.name
        order by h.name
        for no key update of h
    ) held
    where l.name = held.name and l.token = held.token and l.owner is not null
    returning l.name
$$;

-- Deletes rows of locks that have been free for a day.
create function postroad_broker.forget_user_locks() returns bigint
language sql volatile set search_path = pg_catalog, pg_temp as $$
    with old as (
        select l.name from postroad_broker.user_lock l
        where (l.owner is null or l.expires_at < clock_timestamp()) and l.changed_at < clock_timestamp() - interval '1 day'
            and l.expires_at < clock_timestamp() - interval '1 day'
            and not exists (select from postroad_broker.user_lock_waiter w where w.name = l.name)
        limit 1000
        for update skip locked
    ),
    gone as (
        delete from postroad_broker.user_lock l using old where l.name = old.name returning 1
    )
    select count(*) from gone
$$;
