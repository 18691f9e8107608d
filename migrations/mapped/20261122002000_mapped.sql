-- The objects beside outboxes that are not Postroad's own: tables that an origin of the configuration maps. They are made by
-- `postroad install --map`, in the database of the mapped table, and the outbox of Postroad need not be there.

-- The mapped tables. A relay reads a table only when it is listed, and a function below touches no other.
create table postroad.mapped_outbox (
    -- With its schema, quoted where need be.
    table_name text primary key,
    -- The columns with the transaction's id and with the row's number; null where rows are picked up by deletion.
    xid_column text,
    seq_column text,
    installed_at timestamptz not null default clock_timestamp(),
    constraint mapped_outbox_has_both_or_none check ((xid_column is null) = (seq_column is null))
);

-- Who relays them, as in postroad.relay_claim.
create table postroad.mapped_claim (
    table_name text not null,
    broker uuid not null,
    origin_id integer not null,
    origin text not null,
    salt uuid not null,
    claimed_at timestamptz not null default clock_timestamp(),
    released_at timestamptz,
    primary key (table_name, broker, origin_id)
);
create unique index mapped_claim_one on postroad.mapped_claim (table_name) where released_at is null;

-- The relays' marks, as in postroad.relay_mark: a position whose mark is missing was made in a future that this database has lost.
create table postroad.mapped_mark (
    id uuid primary key,
    table_name text not null,
    made_at timestamptz not null default clock_timestamp()
);

-- Up to which of a broker's positions rows have left: written by the transaction that takes them out. A broker whose
-- stored position has a lower number was restored from a backup, and no longer has messages that are gone from here.
create table postroad.mapped_emptied (
    broker uuid not null,
    origin_id integer not null,
    table_name text not null,
    number bigint not null,
    emptied_at timestamptz not null default clock_timestamp(),
    primary key (broker, origin_id, table_name, number)
);

-- Code of others that reading a table, or deleting or updating its rows, would run with the rights of who does it: nobody's code is to run as
-- another, and a table's owner may add to it what he likes. Looked for among triggers and rules of that event, and in everything that a planner
-- evaluates while it only looks at the table: expressions of indexes, of generated columns, of constraints, of partitions and of statistics,
-- and the casts and checks of its columns' types. Code is of others if its role could do less than the role that runs it: not if that role
-- is a superuser or a member of the running role. `event` is select, delete or update. Empty when there is nothing.
--
-- In an expression of others a function is code too, though a trusted role made it, if it takes a text as SQL, or does something: reads a file,
-- writes one. Such functions are volatile, but for a few that print a table as XML. Types of others in an expression are code, since a
-- domain has checks; an enum has nothing.
create function postroad.mapped_code(mapped_table text, event text) returns text[]
language plpgsql stable
set search_path = pg_catalog, pg_temp
-- Planned once: it takes ten times what it takes to run. By the catalogue's indexes it takes 1.5 ms, and 3.5 ms otherwise.
set plan_cache_mode = force_generic_plan
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    found_code text[];
begin
    with recursive tree (id) as (
        select mapped_code.mapped_table::regclass::oid
        union
        select i.inhrelid from pg_inherits as i join tree on i.inhparent = tree.id
    ),
    untrusted (id, name) as materialized (
        select r.oid, r.rolname from pg_roles as r where not (r.rolsuper or pg_has_role(r.oid, current_user, 'member'))
        union all
        -- Who is granted a right by the name of public.
        select 0::oid, 'public'
    ),
    columns (type) as (
        select a.atttypid from pg_attribute as a join tree on a.attrelid = tree.id where a.attnum > 0 and not a.attisdropped
        union
        -- Below a domain can be another.
        select t.typbasetype from columns join pg_type as t on t.oid = columns.type where t.typbasetype <> 0
    ),
    part (class, id, what, owner, expression) as materialized (
        select 'pg_class'::regclass::oid, c.oid, 'the table itself', c.relowner, p.partexprs::text
        from pg_class as c join tree on tree.id = c.oid left join pg_partitioned_table as p on p.partrelid = c.oid
        union all
        select 'pg_class'::regclass, i.indexrelid, 'the index ' || i.indexrelid::regclass, c.relowner, concat(i.indexprs, i.indpred)
        from pg_index as i join tree on i.indrelid = tree.id join pg_class as c on c.oid = i.indrelid
        union all
        select 'pg_constraint'::regclass, k.oid, 'the constraint ' || k.conname, c.relowner, k.conbin::text
        from pg_constraint as k join tree on k.conrelid = tree.id join pg_class as c on c.oid = k.conrelid
        union all
        select 'pg_constraint'::regclass, k.oid, 'the constraint ' || k.conname, t.typowner, k.conbin::text
        from pg_constraint as k join columns on k.contypid = columns.type join pg_type as t on t.oid = k.contypid
        union all
        select 'pg_attrdef'::regclass, d.oid, 'the generated column ' || a.attname, c.relowner, d.adbin::text
        from pg_attrdef as d join tree on d.adrelid = tree.id join pg_class as c on c.oid = d.adrelid
        join pg_attribute as a on a.attrelid = d.adrelid and a.attnum = d.adnum and a.attgenerated <> ''
        union all
        select 'pg_statistic_ext'::regclass, x.oid, 'the statistics ' || x.stxname, x.stxowner, x.stxexprs::text
        from pg_statistic_ext as x join tree on x.stxrelid = tree.id
        union all
        select 'pg_policy'::regclass, y.oid, 'the policy ' || y.polname, c.relowner, concat(y.polqual, y.polwithcheck)
        from pg_policy as y join tree on y.polrelid = tree.id join pg_class as c on c.oid = y.polrelid
        union all
        -- Made by the owner, or by whoever was granted the right to make triggers.
        select 'pg_trigger'::regclass, t.oid, 'the trigger ' || t.tgname, maker.id, t.tgqual::text
        from pg_trigger as t join tree on t.tgrelid = tree.id join pg_class as c on c.oid = t.tgrelid
        cross join lateral (
            select c.relowner
            union
            select a.grantee from aclexplode(c.relacl) as a where a.privilege_type = 'TRIGGER'
        ) as maker (id)
        where not t.tgisinternal and t.tgenabled <> 'D' and t.tgtype & case mapped_code.event when 'delete' then 8 when 'update' then 16 else 0 end <> 0
    ),
    called (what, owner) as (
        select part.what, p.proowner
        from part
        join pg_depend as d on d.classid = part.class and d.objid = part.id and d.refclassid = 'pg_proc'::regclass
        join pg_proc as p on p.oid = d.refobjid
        union all
        select part.what, owner.id
        from part
        join pg_depend as d on d.classid = part.class and d.objid = part.id and d.refclassid = 'pg_operator'::regclass
        join pg_operator as o on o.oid = d.refobjid
        join pg_proc as p on p.oid = o.oprcode
        cross join lateral (values (o.oprowner), (p.proowner)) as owner (id)
        union all
        -- No row of pg_depend names a function of Postgres itself.
        select part.what || ', which calls ' || p.proname, part.owner
        from part
        cross join lateral regexp_matches(part.expression, ':(?:opfuncid|funcid|hashfuncid|negfuncid) (\d+)', 'g') as f (ids)
        join pg_proc as p on p.oid = f.ids[1]::oid
        where part.expression <> '' and (p.provolatile = 'v' and p.oid <> 'clock_timestamp()'::regprocedure or p.proname like '%\_to\_xml%')
        union all
        select part.what || ', which asks other tables', part.owner from part where part.expression like '%{SUBLINK %'
        union all
        -- A column may have such a type: it is read as it is.
        select part.what || ', which has the type ' || t.oid::regtype, t.typowner
        from part
        join pg_depend as d on d.classid = part.class and d.objid = part.id and d.objsubid = 0 and d.refclassid = 'pg_type'::regclass
        join pg_type as t on t.oid = d.refobjid left join pg_type as e on e.oid = t.typelem and t.typcategory = 'A'
        where part.expression <> '' and coalesce(e.typtype, t.typtype) <> 'e'
            and not exists (select from pg_constraint as k where part.class = 'pg_constraint'::regclass and k.oid = part.id and k.contypid = t.oid)
        union all
        select 'a cast of the type ' || columns.type::regtype, p.proowner
        from columns
        join pg_cast as k on columns.type in (k.castsource, k.casttarget)
        join pg_proc as p on p.oid = k.castfunc
        union all
        -- A cast by a function of Postgres itself, made by who owns one of the two types.
        select 'a cast of the type ' || columns.type::regtype, t.typowner
        from columns
        join pg_cast as k on columns.type in (k.castsource, k.casttarget)
        join pg_proc as p on p.oid = k.castfunc and p.provolatile = 'v'
        join pg_type as t on t.oid in (k.castsource, k.casttarget)
        union all
        select 'the rule ' || r.rulename, c.relowner
        from pg_rewrite as r join tree on r.ev_class = tree.id join pg_class as c on c.oid = tree.id
        where r.ev_enabled <> 'D' and r.ev_type = case mapped_code.event when 'delete' then '4' when 'update' then '2' else '1' end::"char"
    )
    select array_agg(distinct called.what || ' (of the role ' || untrusted.name || ')') into found_code
    from called join untrusted on untrusted.id = called.owner;
    return coalesce(found_code, '{}');
end
$$;

-- Has nobody change a table until the transaction ends, and refuses it if its rows cannot be read, deleted or updated without running
-- code of others. The lock comes first: while it is waited for, another relation can take the name, and the next statement sees that one.
create function postroad.mapped_guard(mapped_table text, event text) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    found_code text[];
begin
    execute format('lock table %s in %s mode', mapped_table::regclass, case event when 'select' then 'access share' else 'row exclusive' end);
    if not exists (select from pg_class as c where c.oid = mapped_table::regclass and c.relkind in ('r', 'p')) then
        raise exception '% is no table any more', mapped_table using errcode = 'insufficient_privilege';
    end if;
    -- In a table that has none of what can have code there is none, and each batch of a relay asks.
    if not exists (
            select from pg_class as c where c.oid = mapped_table::regclass
                and (c.relkind <> 'r' or c.relhastriggers or c.relhasrules or c.relhassubclass or c.relrowsecurity)
        )
        and not exists (
            select from pg_attribute as a
            where a.attrelid = mapped_table::regclass and a.attnum > 0 and not a.attisdropped and (a.atttypid >= 16384 or a.attgenerated <> '')
        )
        and not exists (
            select from pg_index as i where i.indrelid = mapped_table::regclass and (i.indexprs is not null or i.indpred is not null)
        )
        and not exists (select from pg_constraint as k where k.conrelid = mapped_table::regclass and k.contype = 'c')
        and not exists (select from pg_statistic_ext as x where x.stxrelid = mapped_table::regclass)
    then
        return;
    end if;
    found_code := postroad.mapped_code(mapped_table, event);
    if found_code <> '{}' then
        raise exception 'to % rows of % would run code of others with the rights of %: %', event, mapped_table, current_user,
            array_to_string(found_code, ', ')
            using errcode = 'insufficient_privilege',
                hint = format('Take it out, or give those roles what they would gain: grant %I to them.', current_user);
    end if;
end
$$;

-- As postroad.relay_restamp, for a listed table: rows that came from another life of the database get an id of this one, and the
-- sequence of the numbers is moved past the highest. The table is of another owner, so this has the rights of the relay that calls it and
-- no others: whatever that owner finds to run, he gains nothing of whoever installed it. It is looked at first, and rows are changed
-- only where that runs no code of his.
create function postroad.mapped_restamp(mapped_table text) returns bigint
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    listed record;
    is_needed boolean;
    restamped bigint := 0;
    highest bigint;
    numbers regclass;
begin
    select m.table_name, m.xid_column, m.seq_column into listed
    from postroad.mapped_outbox as m where m.table_name = mapped_table and m.xid_column is not null;
    if not found then
        return 0;
    end if;
    perform postroad.mapped_guard(listed.table_name, 'select');
    execute format(
        'select exists (select from %1$s where %2$I >= pg_snapshot_xmin(pg_current_snapshot()) '
        'and not pg_visible_in_snapshot(%2$I, pg_current_snapshot()))', listed.table_name, listed.xid_column) into is_needed;
    if is_needed then
        perform postroad.mapped_guard(listed.table_name, 'update');
        execute format(
            'update %1$s set %2$I = pg_current_xact_id() where %2$I >= pg_snapshot_xmin(pg_current_snapshot()) '
            'and not pg_visible_in_snapshot(%2$I, pg_current_snapshot())', listed.table_name, listed.xid_column);
        get diagnostics restamped = row_count;
    end if;
    -- By its number from here on: another relation could take the name.
    numbers := pg_get_serial_sequence(listed.table_name, listed.seq_column)::regclass;
    if numbers is not null then
        execute format('select max(%I) from %s', listed.seq_column, listed.table_name) into highest;
        if highest >= (
            select coalesce(pg_sequence_last_value(s.seqrelid) + s.seqincrement, s.seqstart) from pg_sequence as s where s.seqrelid = numbers
        ) then
            perform setval(numbers, highest + 10000);
        end if;
    end if;
    return restamped;
end
$$;
revoke all on function postroad.mapped_code(text, text), postroad.mapped_guard(text, text), postroad.mapped_restamp(text) from public;
