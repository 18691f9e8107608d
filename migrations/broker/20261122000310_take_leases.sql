-- Takes the leases among p_names that are free, that this incarnation wants again, or whose holder is dead: marked so,
-- not renewed in time, or of this node's own address (its process is gone: this one holds its socket). Returns those taken.
--
-- Locks in the order that all of Postroad follows: node rows by incarnation, then leases by name. The holder's row is locked
-- and looked at again before it is marked dead, so a holder whose heartbeat came first keeps all that it has; and a dead
-- incarnation is never renewed, so it cannot come back between. A write under the old epoch holds the lease's row until it
-- has committed: the new epoch starts after it. Every taking raises the epoch, also of a lease that this incarnation held:
-- it asks only when it does not know at which epoch.
create function postroad_broker.take_leases(p_incarnation bigint, p_names text[])
returns table (lease_name text, lease_epoch bigint)
language plpgsql volatile as $$
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
                and (n.dead_at is not null or n.expires_at < clock_timestamp() or n.address = v_address)
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
        and (n.expires_at < clock_timestamp() or n.address = v_address);

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
        for no key update of l
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
