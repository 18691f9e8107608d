-- The outbox.
do $postroad$
declare
    takes_rows constant boolean := /*takes_rows*/;
    held bigint;
    found_claim record;
    called regprocedure;
begin
    if to_regclass('postroad.outbox') is null then
        return;
    end if;
    select c.origin, c.broker into found_claim from postroad.relay_claim c where c.released_at is null;
    if found then
        raise exception 'the outbox is relayed as the origin % of the broker %', found_claim.origin, found_claim.broker
            using errcode = 'object_in_use',
                hint = 'Once all is relayed, take the origin out of the broker''s configuration, and run `postroad release` on this database.';
    end if;
    -- Until the transaction ends nobody adds one.
    lock table postroad.outbox in access exclusive mode;
    select count(*) into held from postroad.outbox;
    if held > 0 and not takes_rows then
        raise exception 'the outbox holds % rows, and only the broker knows which of them it has relayed', held
            using errcode = 'object_in_use',
                hint = 'Once `relayed_through` of the origin is past the last of them, or if they may be lost, run `postroad uninstall --force`.';
    end if;
    drop table postroad.outbox, postroad.relay_mark, postroad.relay_emptied, postroad.relay_claim, postroad.outbox_leaf;
    drop sequence postroad.outbox_seq;
    for called in
        select p.oid from pg_proc p where p.pronamespace = 'postroad'::regnamespace
            and p.proname in ('publish', 'lock_key', 'outbox_row_is_valid', 'default_source', 'uri_segment', 'relay_restamp')
        order by p.oid desc
    loop
        execute format('drop function %s', called);
    end loop;
    delete from postroad.migration where version in (20261122000100, 20261122000200);
end
$postroad$;
