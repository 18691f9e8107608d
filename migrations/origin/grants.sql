-- The default source, which has the database's name in it: two databases that number their messages themselves would otherwise have
-- messages of one source and id. Run at the end of every install, and so put right in a database that got another name.
do $postroad$
declare
    wanted constant text := '/postroad/' || postroad.uri_segment(current_database());
begin
    if postroad.default_source() <> wanted then
        execute format('create or replace function postroad.default_source() returns text language sql immutable parallel safe return %L::text', wanted);
        execute format('alter table postroad.outbox alter column source set default %L', wanted);
    end if;
end
$postroad$;

-- The two roles of an origin and what they may do. Not a migration: run at the end of every install, since roles belong to the
-- cluster and can be missing in a restored one. Roles are made where that is allowed and missing; without both, no grants.
do $postroad$
declare
    needed text;
    leaf regclass;
    columns constant text := 'topic, payload, payload_bytes, key, type, id, source, subject, content_type, data_schema, headers, time, expected_version, deliver_at';
begin
    foreach needed in array array['postroad_producer', 'postroad_relay'] loop
        if not exists (select from pg_catalog.pg_roles where rolname = needed) then
            begin
                execute format('create role %I nologin', needed);
            exception
                -- Another database of this cluster is being installed at the same time.
                when duplicate_object or unique_violation then null;
                when insufficient_privilege then
                    raise notice 'postroad: % may not create the role %: grants are skipped; create postroad_producer and postroad_relay and install again',
                        current_user, needed;
                    return;
            end;
        end if;
    end loop;

    -- A producer inserts, by column: a row with a transaction id, number or leaf of its own making would never be relayed. It reads
    -- id and seq, which is what an insert with RETURNING needs.
    grant usage on schema postroad to postroad_producer, postroad_relay;
    grant usage on sequence postroad.outbox_seq to postroad_producer;
    grant execute on function
        postroad.outbox_row_is_valid(text, text, bytea, text, text, text, text, text, text, text, jsonb, timestamptz, bigint, timestamptz),
        postroad.default_source(), postroad.lock_key(text),
        postroad.publish(text, text, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz),
        postroad.publish(text, jsonb, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz),
        postroad.publish(text, json, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz),
        postroad.publish(text, bytea, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz)
    to postroad_producer;
    -- A relay reads, truncates leaves that it has passed, and leaves marks, and notes what it has emptied.
    for leaf in
        select 'postroad.outbox'::regclass
        union all
        select inhrelid::regclass from pg_catalog.pg_inherits where inhparent = 'postroad.outbox'::regclass
    loop
        execute format('grant insert (%s), select (id, seq) on %s to postroad_producer', columns, leaf);
        execute format('grant select, truncate on %s to postroad_relay', leaf);
    end loop;
    grant select, insert, truncate on postroad.relay_mark to postroad_relay;
    grant select, insert, update on postroad.relay_emptied, postroad.outbox_leaf to postroad_relay;
    grant execute on function postroad.relay_restamp() to postroad_relay;
    if to_regclass('postroad.migration') is not null then
        grant select on postroad.migration to postroad_relay;
    end if;
end
$postroad$;
