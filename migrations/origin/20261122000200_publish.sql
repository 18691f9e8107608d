-- postroad.publish: an insert into the outbox for those who would rather call a function. Returns the message's id. Four
-- forms by the payload's type; an untyped literal takes the text form, which stores it as it stands.
--
-- order_lock => true takes an advisory lock on the key until the transaction ends, for producers that hold no row lock of
-- the key's own: messages of a key are relayed in the order in which their transactions inserted them under one lock. The
-- locks are a fixed space of 1,024 (a lock per key would run the instance out of lock memory), so two keys can share one.
--
-- expected_version => n, on topics of a keyed stream: see the column.
-- deliver_at => now() + interval '1 hour' has the message enter its stream then.
--
-- They run in the producers' sessions, as the producers. Each name in them has its schema, or is bound when they are made, so that
-- nothing that another role plants in a schema of the producer's search_path runs; a search_path of their own would cost 4 us a call.

create function postroad.lock_key(key text) returns void
language sql volatile
begin atomic
    select pg_catalog.pg_advisory_xact_lock(
        1886548852, (pg_catalog.hashtextextended(key, 0) operator(pg_catalog.&) 1023)::pg_catalog.int4)
    where key is not null;
end;

create function postroad.publish(
    topic text, payload text default null, key text default null, type text default null, headers jsonb default null,
    id text default null, source text default null, subject text default null, content_type text default null,
    order_lock boolean default false, expected_version bigint default null,
    deliver_at timestamptz default null
) returns text
language plpgsql volatile as $$
#variable_conflict use_column
declare
    new_id pg_catalog.text := coalesce(publish.id, pg_catalog.gen_random_uuid()::pg_catalog.text);
begin
    if publish.order_lock then
        perform postroad.lock_key(publish.key);
    end if;
    insert into postroad.outbox (topic, payload, key, type, headers, id, source, subject, content_type, expected_version,
        deliver_at)
        values (publish.topic, publish.payload, publish.key, publish.type, publish.headers, new_id,
            coalesce(publish.source, postroad.default_source()), publish.subject, publish.content_type, publish.expected_version,
            publish.deliver_at);
    return new_id;
end
$$;

create function postroad.publish(
    topic text, payload jsonb, key text default null, type text default null, headers jsonb default null,
    id text default null, source text default null, subject text default null, content_type text default 'application/json',
    order_lock boolean default false, expected_version bigint default null,
    deliver_at timestamptz default null
) returns text
language sql volatile
begin atomic
    select postroad.publish(topic, payload::pg_catalog.text, key, type, headers, id, source, subject, content_type, order_lock,
        expected_version, deliver_at);
end;

create function postroad.publish(
    topic text, payload json, key text default null, type text default null, headers jsonb default null,
    id text default null, source text default null, subject text default null, content_type text default 'application/json',
    order_lock boolean default false, expected_version bigint default null,
    deliver_at timestamptz default null
) returns text
language sql volatile
begin atomic
    select postroad.publish(topic, payload::pg_catalog.text, key, type, headers, id, source, subject, content_type, order_lock,
        expected_version, deliver_at);
end;

create function postroad.publish(
    topic text, payload bytea, key text default null, type text default null, headers jsonb default null,
    id text default null, source text default null, subject text default null, content_type text default null,
    order_lock boolean default false, expected_version bigint default null,
    deliver_at timestamptz default null
) returns text
language plpgsql volatile as $$
#variable_conflict use_column
declare
    new_id pg_catalog.text := coalesce(publish.id, pg_catalog.gen_random_uuid()::pg_catalog.text);
begin
    if publish.order_lock then
        perform postroad.lock_key(publish.key);
    end if;
    insert into postroad.outbox (topic, payload_bytes, key, type, headers, id, source, subject, content_type, expected_version,
        deliver_at)
        values (publish.topic, publish.payload, publish.key, publish.type, publish.headers, new_id,
            coalesce(publish.source, postroad.default_source()), publish.subject, publish.content_type, publish.expected_version,
            publish.deliver_at);
    return new_id;
end
$$;

revoke all on function
    postroad.uri_segment(text), postroad.default_source(), postroad.outbox_row_is_valid(
        text, text, bytea, text, text, text, text, text, text, text, jsonb, timestamptz, bigint, timestamptz),
    postroad.lock_key(text),
    postroad.publish(text, text, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz),
    postroad.publish(text, jsonb, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz),
    postroad.publish(text, json, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz),
    postroad.publish(text, bytea, text, text, jsonb, text, text, text, text, boolean, bigint, timestamptz)
from public;
