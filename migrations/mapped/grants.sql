-- The role of a relay and what it may do beside mapped tables. Not a migration: run at the end of every install. The role is made
-- where that is allowed and missing; without it, no grants.
do $postroad$
begin
    if not exists (select from pg_catalog.pg_roles where rolname = 'postroad_relay') then
        begin
            create role postroad_relay nologin;
        exception
            -- Another database of this cluster is being installed at the same time.
            when duplicate_object or unique_violation then null;
            when insufficient_privilege then
                raise notice 'postroad: % may not create the role postroad_relay: grants are skipped; create it and install again',
                    current_user;
                return;
        end;
    end if;
    grant usage on schema postroad to postroad_relay;
    grant select on postroad.mapped_outbox, postroad.migration to postroad_relay;
    grant update (broker, origin, claimed_at) on postroad.mapped_outbox to postroad_relay;
    grant select, insert, delete on postroad.mapped_mark to postroad_relay;
    grant select, insert, delete on postroad.mapped_emptied to postroad_relay;
    grant execute on function postroad.mapped_restamp(text) to postroad_relay;
end
$postroad$;
