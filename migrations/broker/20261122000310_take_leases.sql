-- Takes the leases among p_names that are free, that this incarnation wants again, or whose holder is dead: marked so,
-- not renewed in time, or of this node's own address (its process is gone: this one holds its socket). Returns those taken.
--
-- p_silent are incarnations that the caller has watched, by its own clock, for as long as they may live without a heartbeat,
-- and p_silent_since what their rows said all the while: they are dead although the database's clock, which has jumped back,
-- takes them to live. One that was renewed meanwhile is not.
--
-- Locks in the order that all of Postroad follows: node rows by incarnation, then leases by name. The holder's row is locked
-- and looked at again before it is marked dead, so a holder whose heartbeat came first keeps all that it has; and a dead
-- incarnation is never renewed, so it cannot come back between. A write under the old epoch holds the lease's row until it
-- has committed: the new epoch starts after it. A row that is locked is passed over, and asked for again in a moment: a node that
-- stopped within a transaction must not hold up the taking of other leases, nor the heartbeat behind it. Every taking raises the epoch, also of a lease that this incarnation held:
-- it asks only when it does not know at which epoch.
create function postroad_broker.take_leases(
    p_incarnation bigint, p_names text[], p_silent bigint[], p_silent_since timestamptz[])
returns table (lease_name text, lease_epoch bigint)
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_address text;
    v_suspects bigint[];
    v_free text[];
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'take_leases must run at read committed' using errcode = 'invalid_transaction_state';
    end if;

    insert into postroad_broker.lease (name)
    select w.name from unnest(p_names) as w (name)
    where not exists (select from postroad_broker.lease l where l.name = w.name)
    order by w.name
    on conflict do nothing;

    select n.address into v_address from postroad_broker.node n where n.incarnation = p_incarnation;

    select array_agg(s.incarnation) into v_suspects
    from (
        select n.incarnation
        from postroad_broker.node n
        where n.incarnation = p_incarnation
            or (
                n.incarnation in (select l.holder from postroad_broker.lease l where l.name = any (p_names))
                and (n.dead_at is not null or n.expires_at < clock_timestamp() or n.address = v_address
                    or n.incarnation = any (p_silent))
            )
        order by n.incarnation
        for no key update
    ) s;

    -- Fresh snapshots from here on: what the locks waited for is seen.
    perform from postroad_broker.node n where n.incarnation = p_incarnation and n.dead_at is null;
    if not found then
        return;
    end if;

    update postroad_broker.node n set dead_at = clock_timestamp()
    where n.incarnation = any (v_suspects)
        and n.incarnation <> p_incarnation
        and n.dead_at is null
        and (n.expires_at < clock_timestamp() or n.address = v_address
            or exists (
                select from unnest(p_silent, p_silent_since) as s (incarnation, expires_at)
                where s.incarnation = n.incarnation and s.expires_at = n.expires_at));

    select array_agg(f.name) into v_free
    from (
        select l.name
        from postroad_broker.lease l
        where l.name = any (p_names)
            and (
                l.holder is null
                or l.holder = p_incarnation
                or exists (
                    select from postroad_broker.node n where n.incarnation = l.holder and n.dead_at is not null
                )
            )
        order by l.name
        for no key update of l skip locked
    ) f;

    return query
    update postroad_broker.lease l
    set epoch = l.epoch + 1, holder = p_incarnation, acquired_at = clock_timestamp()
    where l.name = any (v_free)
        and (
            l.holder is null
            or l.holder = p_incarnation
            or exists (select from postroad_broker.node n where n.incarnation = l.holder and n.dead_at is not null)
        )
    returning l.name, l.epoch;
end
$$;

-- A new incarnation at an address. Its former ones are dead, since this process has their socket, and it is to hold what they
-- were to hold; one that was not marked dead before says what that is, until the new one says so itself. Node rows are locked in
-- their order, then the assignment.
create function postroad_broker.register_node(p_address text, p_url text, p_ttl_seconds double precision)
returns table (new_incarnation bigint, clock timestamptz, former_wants text[])
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    v_former bigint[];
    v_wants text[];
    v_new bigint;
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'register_node must run at read committed' using errcode = 'invalid_transaction_state';
    end if;
    select array_agg(f.incarnation) into v_former
    from (
        select n.incarnation from postroad_broker.node n
        where n.address = p_address order by n.incarnation for no key update
    ) f;
    select n.wants into v_wants from postroad_broker.node n
    where n.incarnation = any (v_former) and n.dead_at is null and not n.is_leaving
    order by n.incarnation desc limit 1;
    v_wants := coalesce(v_wants, '{}');
    update postroad_broker.node n set dead_at = clock_timestamp()
    where n.incarnation = any (v_former) and n.dead_at is null;
    insert into postroad_broker.node (address, url, expires_at, ttl_seconds, wants)
    values (p_address, p_url, clock_timestamp() + make_interval(secs => p_ttl_seconds), p_ttl_seconds, v_wants)
    returning incarnation into v_new;
    update postroad_broker.assignment a set node = v_new where a.node = any (v_former);
    return query select v_new, clock_timestamp(), v_wants;
end
$$;

-- Writes who is to hold what, if the caller still leads: rows for p_names, and none for p_gone.
create function postroad_broker.write_assignment(
    p_incarnation bigint, p_epoch bigint, p_names text[], p_nodes bigint[], p_gone text[])
returns boolean
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'write_assignment must run at read committed' using errcode = 'invalid_transaction_state';
    end if;
    perform from postroad_broker.lease l
    where l.name = 'leader' and l.epoch = p_epoch and l.holder = p_incarnation
    for no key update;
    if not found then
        return false;
    end if;
    delete from postroad_broker.assignment a where a.name = any (p_gone);
    insert into postroad_broker.assignment (name, node)
    select w.name, w.node from unnest(p_names, p_nodes) as w (name, node) order by w.name
    on conflict (name) do update set node = excluded.node where assignment.node <> excluded.node;
    return true;
end
$$;
