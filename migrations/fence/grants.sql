-- The role of those who work under locks, and what it may do. Not a migration: run at the end of every install, since roles belong to the
-- cluster and can be missing in a restored one. The role is made where that is allowed and missing; without it, no grants.
do $postroad$
begin
    if not exists (select from pg_catalog.pg_roles where rolname = 'postroad_fenced') then
        begin
            create role postroad_fenced nologin;
        exception
            -- Another database of this cluster is being installed at the same time.
            when duplicate_object or unique_violation then null;
            when insufficient_privilege then
                raise notice 'postroad: % may not create the role postroad_fenced: grants are skipped; create it and install again', current_user;
                return;
        end;
    end if;
    grant usage on schema postroad to postroad_fenced;
    grant execute on function postroad.assert_fence(text, bigint) to postroad_fenced;
end
$postroad$;
