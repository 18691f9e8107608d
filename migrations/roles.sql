-- The roles of a database. Not a migration: run at the end of every install, before the rights, since roles belong to the cluster and can be
-- missing in a restored one. Each database has roles of its own names: one that belonged to several would let the services of each
-- write, and read, in all of them.

-- `postroad_producer_shop` in the database `shop`. A name of a database that leaves no room is hashed.
create or replace function postroad.role_name(kind text) returns text
language sql stable parallel safe
return 'postroad_' || kind || '_'
    || case when octet_length(current_database()) <= 45 then current_database()::text else md5(current_database()) end;

-- Makes a role of this database, unless it is there. Returns its name, or null where it is missing and may not be made.
create or replace function postroad.make_role(kind text) returns text
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
declare
    made constant text := postroad.role_name(kind);
    elsewhere text;
    foreigner record;
    mapped text;
    numbers text;
begin
    if not exists (select from pg_roles where rolname = made) then
        begin
            execute format('create role %I nologin', made);
            execute format('comment on role %I is %L', made, 'made by postroad install in the database ' || current_database());
        exception
            -- The same database is being installed at the same time.
            when duplicate_object or unique_violation then null;
            when insufficient_privilege then
                raise notice 'postroad: % may not create the role %: grants are skipped; have it created and install again', current_user, made;
                return null;
        end;
    end if;
    -- A role by this name that has rights in another database is that one's, which was called as this one is now.
    select string_agg(distinct b.datname, ', ') into elsewhere
    from pg_roles r
    join pg_shdepend d on d.refclassid = 'pg_authid'::regclass and d.refobjid = r.oid
    join pg_database b on b.oid = d.dbid
    where r.rolname = made and b.datname <> current_database();
    if elsewhere is not null and not exists (
        select from pg_roles r
        join pg_shdepend d on d.refclassid = 'pg_authid'::regclass and d.refobjid = r.oid
        join pg_database b on b.oid = d.dbid
        where r.rolname = made and b.datname = current_database()
    ) then
        raise exception 'the role % has rights in the database %, and whom it was granted to would have them here too', made, elsewhere
            using errcode = 'duplicate_object', hint = format('Give it the name of that database, by `alter role %I rename to …`, and install again.', made);
    end if;
    -- Roles of another database, which a dump, a template or a new name of the database brought. A person's own can have such a name too: it
    -- logs in, and no install has made it.
    for foreigner in
        select distinct r.rolname as name
        from pg_shdepend d
        join pg_roles r on r.oid = d.refobjid
        where d.refclassid = 'pg_authid'::regclass and d.deptype = 'a'
            and d.dbid = (select b.oid from pg_database b where b.datname = current_database())
            and r.rolname ~ ('^postroad_' || kind || '(_|$)') and r.rolname <> made
            and (not r.rolcanlogin or shobj_description(r.oid, 'pg_authid') like 'made by postroad install in the database %')
    loop
        execute format('revoke all on all tables in schema postroad from %I', foreigner.name);
        execute format('revoke all on all sequences in schema postroad from %I', foreigner.name);
        execute format('revoke all on all functions in schema postroad from %I', foreigner.name);
        execute format('revoke all on schema postroad from %I', foreigner.name);
        if to_regclass('postroad.mapped_outbox') is not null then
            for mapped in execute 'select m.table_name from postroad.mapped_outbox m where to_regclass(m.table_name) is not null' loop
                begin
                    execute format('revoke all on table %s from %I', mapped, foreigner.name);
                    for numbers in
                        select d.objid::regclass::text from pg_depend d join pg_class c on c.oid = d.objid and c.relkind = 'S'
                        where d.classid = 'pg_class'::regclass and d.refclassid = d.classid and d.refobjid = to_regclass(mapped)
                    loop
                        execute format('revoke all on sequence %s from %I', numbers, foreigner.name);
                    end loop;
                exception
                    when insufficient_privilege then
                        raise notice 'postroad: % may not take from the role % what it may do with %', current_user, foreigner.name, mapped;
                end;
            end loop;
        end if;
        raise notice 'postroad: the role % of another database lost its rights in this one', foreigner.name;
    end loop;
    return made;
end
$$;
revoke all on function postroad.make_role(text) from public;

