-- The schema, when nothing is left in it, and the roles that have no rights left in this database.
do $postroad$
declare
    kind text;
    role text;
    is_used boolean;
begin
    if to_regprocedure('postroad.role_name(text)') is null then
        return;
    end if;
    foreach kind in array array['producer', 'relay', 'consumer', 'fenced'] loop
        role := postroad.role_name(kind);
        is_used := case kind
            when 'producer' then to_regclass('postroad.outbox') is not null
            when 'relay' then to_regclass('postroad.outbox') is not null or to_regclass('postroad.mapped_outbox') is not null
            when 'consumer' then to_regclass('postroad.inbox') is not null
            else to_regclass('postroad.fence') is not null
        end;
        continue when is_used or not exists (select from pg_roles r where r.rolname = role);
        begin
            -- Its rights in this database: it owns nothing, being nobody's login.
            execute format('revoke all on schema postroad from %I', role);
            if to_regclass('postroad.migration') is not null then
                execute format('revoke all on postroad.migration from %I', role);
            end if;
            execute format('drop role %I', role);
        exception
            when insufficient_privilege or dependent_objects_still_exist or object_in_use then
                raise notice 'postroad: the role % stays: %', role, sqlerrm;
        end;
    end loop;
    if to_regclass('postroad.migration') is not null and not exists (select from postroad.migration) then
        drop table postroad.migration;
        drop function postroad.make_role(text), postroad.role_name(text);
        -- Not with what somebody else has put there.
        drop schema postroad restrict;
    end if;
end
$postroad$;
