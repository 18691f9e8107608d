-- The inbox. Which messages were accepted is forgotten with it.
do $postroad$
declare
    called regprocedure;
begin
    if to_regclass('postroad.inbox') is null then
        return;
    end if;
    -- Leaves that were emptied and not dropped yet are partitions too.
    drop table postroad.inbox, postroad.inbox_leaf, postroad.inbox_setting;
    drop sequence postroad.inbox_leaf_number;
    for called in
        select p.oid from pg_proc p where p.pronamespace = 'postroad'::regnamespace and p.proname like 'inbox\_%'
    loop
        execute format('drop function %s', called);
    end loop;
    delete from postroad.migration where version = 20261122001000;
end
$postroad$;
