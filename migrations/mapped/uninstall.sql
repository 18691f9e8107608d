-- Takes out the rows and tables beside a mapped table. The table itself stays, without the columns that an install added.
do $postroad$
declare
    schema_name constant text := /*schema*/;
    mapped_table constant text := format('%I.%I', schema_name, /*name*/);
    added text;
    found_claim record;
    relay text;
    numbers text;
begin
    if to_regclass('postroad.mapped_outbox') is null then
        return;
    end if;
    relay := postroad.role_name('relay');
    select c.origin, c.broker into found_claim
    from postroad.mapped_claim c where c.table_name = mapped_table and c.released_at is null;
    if found then
        raise exception '% is relayed as the origin % of the broker %', mapped_table, found_claim.origin, found_claim.broker
            using errcode = 'object_in_use',
                hint = 'Once all is relayed, take the origin out of the broker''s configuration, and run `postroad release --table` on this database.';
    end if;
    if to_regclass(mapped_table) is not null then
        select pg_get_serial_sequence(mapped_table, m.seq_column) into numbers
        from postroad.mapped_outbox m
        join pg_attribute a on a.attrelid = to_regclass(mapped_table) and a.attname = m.seq_column and not a.attisdropped
        where m.table_name = mapped_table;
        if numbers is not null and exists (select from pg_roles where rolname = relay) then
            execute format('revoke all on sequence %s from %I', numbers, relay);
        end if;
        foreach added in array array_remove(array[/*xid*/, /*seq*/]::text[], null) loop
            execute format('alter table %s drop column if exists %I', mapped_table, added);
        end loop;
        if exists (select from pg_roles where rolname = relay) then
            execute format('revoke all on table %s from %I', mapped_table, relay);
            -- Another mapped table of the schema needs it, and so it stays until the last is taken out.
            if not exists (
                select from postroad.mapped_outbox m join pg_class c on c.oid = to_regclass(m.table_name)
                where c.relnamespace = quote_ident(schema_name)::regnamespace and m.table_name <> mapped_table
            ) then
                execute format('revoke usage on schema %I from %I', schema_name, relay);
            end if;
        end if;
    end if;
    delete from postroad.mapped_outbox where table_name = mapped_table;
    delete from postroad.mapped_claim where table_name = mapped_table;
    delete from postroad.mapped_mark where table_name = mapped_table;
    delete from postroad.mapped_emptied where table_name = mapped_table;
    if not exists (select from postroad.mapped_outbox) then
        drop table postroad.mapped_outbox, postroad.mapped_claim, postroad.mapped_mark, postroad.mapped_emptied;
        drop function postroad.mapped_restamp(text), postroad.mapped_guard(text, text), postroad.mapped_code(text, text);
        delete from postroad.migration where version = 20261122002000;
    end if;
end
$postroad$;
