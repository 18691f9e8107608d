-- Checked once the schema is there, and before anything is put into it or run in it. The owner of the schema, or of an object in it, has code run by
-- whoever uses that object: a trigger on the table of migrations runs with the rights of the installing role. So each owner must be a superuser,
-- or a role that the installing role is a member of. A superuser is a member of all roles, and so accepts superusers alone: not even the
-- database's owner.
do $postroad$
declare
    looked_at constant text := /*schema*/;
    is_superuser constant boolean := (select u.rolsuper from pg_roles u where u.rolname = current_user);
    found_owner text;
    found_thing text;
begin
    with owner (id, name) as (
        select r.oid, r.rolname from pg_roles r
        where not r.rolsuper and (is_superuser or not pg_has_role(r.oid, 'usage'))
            -- A role without members of its own: it stands for whoever owns the database.
            and not (r.rolname = 'pg_database_owner' and (
                select o.rolsuper from pg_database b join pg_roles o on o.oid = b.datdba where b.datname = current_database()))
    ),
    thing (what, owner) as (
        select '', n.nspowner from pg_namespace n where n.nspname = looked_at
        union all
        select c.oid::regclass::text, c.relowner from pg_class c join pg_namespace n on n.oid = c.relnamespace where n.nspname = looked_at
        union all
        select p.oid::regprocedure::text, p.proowner from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname = looked_at
        union all
        select t.oid::regtype::text, t.typowner from pg_type t join pg_namespace n on n.oid = t.typnamespace where n.nspname = looked_at
        union all
        select o.oid::regoperator::text, o.oprowner from pg_operator o join pg_namespace n on n.oid = o.oprnamespace where n.nspname = looked_at
    )
    select owner.name, thing.what into found_owner, found_thing
    from thing join owner on owner.id = thing.owner
    order by thing.what limit 1;
    if found_owner is null then
        return;
    end if;
    if found_thing = '' then
        raise exception 'the schema % is there and belongs to the role %, whose code would run with the rights of %',
            looked_at, found_owner, current_user
            using errcode = 'insufficient_privilege',
                hint = format('Do this as the role %I. Or drop the schema.', found_owner);
    end if;
    raise exception '% in the schema % belongs to the role %, whose code would run with the rights of %',
        found_thing, looked_at, found_owner, current_user
        using errcode = 'insufficient_privilege',
            hint = format('Drop it, or do this as the role %I.', found_owner);
end
$postroad$;
