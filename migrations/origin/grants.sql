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

-- Grants of the two roles of an origin. Without both, no grants.
do $postroad$
declare
    producer constant text := postroad.make_role('producer');
    relay constant text := postroad.make_role('relay');
    leaf regclass;
    columns constant text := 'topic, payload, payload_bytes, key, type, id, source, subject, content_type, data_schema, headers, time, expected_version, deliver_at';
begin
    if producer is null or relay is null then
        return;
    end if;
    -- A producer inserts, by column: a row with a transaction id, number or leaf of its own making would never be relayed. It reads
    -- what it inserts: an insert with RETURNING, as mappers of objects to tables make it, of all columns, needs the right to read each.
    execute format('grant usage on schema postroad to %I, %I', producer, relay);
    execute format('grant usage on sequence postroad.outbox_seq to %I', producer);
    execute format('grant execute on function
        postroad.outbox_row_is_valid(text, text, bytea, text, text, text, text, text, text, text, jsonb, timestamptz, bigint, timestamptz),
        postroad.default_source(), postroad.lock_key(text),
        postroad.publish(text, text, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz),
        postroad.publish(text, jsonb, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz),
        postroad.publish(text, json, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz),
        postroad.publish(text, bytea, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz)
    to %I', producer);
    execute format('grant select on postroad.outbox to %I', producer);
    -- A relay reads, truncates leaves that it has passed, leaves marks, claims the outbox, and notes what it has emptied.
    for leaf in
        select 'postroad.outbox'::regclass
        union all
        select inhrelid::regclass from pg_catalog.pg_inherits where inhparent = 'postroad.outbox'::regclass
    loop
        execute format('grant insert (%s) on %s to %I', columns, leaf, producer);
        execute format('grant select, truncate on %s to %I', leaf, relay);
    end loop;
    execute format('grant select, insert, truncate on postroad.relay_mark to %I', relay);
    execute format('grant select, insert, update on postroad.relay_emptied, postroad.relay_claim, postroad.outbox_leaf to %I', relay);
    execute format('grant execute on function postroad.relay_restamp() to %I', relay);
    if to_regclass('postroad.migration') is not null then
        execute format('grant select on postroad.migration to %I', relay);
    end if;
end
$postroad$;
