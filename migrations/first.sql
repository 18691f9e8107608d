-- Checked before an install makes anything. The owner of the schema can put anything into it and remove anything from it, so functions that
-- others call would be the owner's. So the schema must belong to the installing role, to the database's owner, to a superuser, or to a role
-- that the installing role, if it is not a superuser, is a member of.
do $postroad$
declare
    found_schema text;
    found_owner text;
begin
    select n.nspname, r.rolname into found_schema, found_owner
    from pg_namespace n join pg_roles r on r.oid = n.nspowner
    where n.nspname in ('postroad', 'postroad_broker') and r.rolname not in (current_user, 'pg_database_owner') and not r.rolsuper
        and n.nspowner <> (select b.datdba from pg_database b where b.datname = current_database())
        and ((select u.rolsuper from pg_roles u where u.rolname = current_user) or not pg_has_role(n.nspowner, 'usage'));
    if found_owner is not null then
        raise exception 'the schema % is there and belongs to the role %', found_schema, found_owner
            using errcode = 'insufficient_privilege',
                hint = format('Drop it, or make it yours: alter schema %I owner to %I.', found_schema, current_user);
    end if;
end
$postroad$;
