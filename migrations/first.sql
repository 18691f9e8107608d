-- Looked at before an install makes anything.
do $postroad$
declare
    found_owner text;
begin
    -- Whose schema it is can put into it what he likes, and take it out. That of an install before is left as it is.
    select r.rolname into found_owner
    from pg_namespace n join pg_roles r on r.oid = n.nspowner
    where n.nspname = 'postroad' and to_regclass('postroad.migration') is null and r.rolname <> current_user and not r.rolsuper
        and n.nspowner <> (select b.datdba from pg_database b where b.datname = current_database())
        and r.rolname <> 'pg_database_owner';
    if found_owner is not null then
        raise exception 'the schema postroad is there and belongs to the role %', found_owner
            using errcode = 'insufficient_privilege',
                hint = format('Drop it, or make it yours: alter schema postroad owner to %I.', current_user);
    end if;
end
$postroad$;
