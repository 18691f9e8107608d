-- The outbox: what producers insert into, inside their own transactions. Insert-only; its space comes back by TRUNCATE of
-- whole leaves, so nothing here is ever vacuumed for its dead rows, and a pinned xmin slows nothing down.

-- CACHE 1: a session that keeps numbers in stock would hand them out in another order than the row locks of its key.
create sequence postroad.outbox_seq as bigint cache 1;

-- Whether a row of the outbox can become a message. What is wrong with it is raised under the name of the rule, as a constraint of
-- its own would be. It is a function since constraints are read and planned anew by each statement that inserts: fourteen of them
-- took 90 of the 130 us of an insert of one row.
--
-- It has no search_path of its own, which costs as much as the rest. A producer who puts other functions before those of pg_catalog
-- deceives itself alone: the relay looks again.
create function postroad.outbox_row_is_valid(
    topic text, payload text, payload_bytes bytea, key text, type text, id text, source text, subject text, content_type text,
    data_schema text, headers jsonb, "time" timestamptz, expected_version bigint, deliver_at timestamptz
) returns boolean
language plpgsql immutable parallel safe as $$
declare
    -- A rule that is broken. Nulls break none.
    broken text;
begin
    broken := case
        when octet_length(topic) > 255 or topic collate "C" !~ '^[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+)*$' then 'outbox_topic_is_valid'
        when octet_length(payload) > 16777216 then 'outbox_payload_is_at_most_16_mib'
        when octet_length(key) not between 1 and 512 then 'outbox_key_is_1_to_512_bytes'
        when octet_length(id) not between 1 and 1024 then 'outbox_id_is_1_to_1024_bytes'
        when octet_length(source) not between 1 and 1024 then 'outbox_source_is_1_to_1024_bytes'
        when "time" < timestamptz '0001-01-01 00:00:00+00' or "time" >= timestamptz '10000-01-01 00:00:00+00'
            then 'outbox_time_has_a_four_digit_year'
    end;
    if broken is null
        and num_nonnulls(payload_bytes, type, subject, content_type, data_schema, headers, expected_version, deliver_at) > 0
    then
        broken := case
            when payload is not null and payload_bytes is not null then 'outbox_payload_is_one'
            when octet_length(payload_bytes) > 16777216 then 'outbox_payload_is_at_most_16_mib'
            when octet_length(type) not between 1 and 1024 then 'outbox_type_is_1_to_1024_bytes'
            when octet_length(subject) not between 1 and 1024 then 'outbox_subject_is_1_to_1024_bytes'
            when octet_length(content_type) not between 1 and 255 or content_type collate "C" !~ '^[!-~]([ -~]*[!-~])?$'
                then 'outbox_content_type_is_valid'
            when octet_length(data_schema) not between 1 and 1024 then 'outbox_data_schema_is_1_to_1024_bytes'
            when expected_version is not null and (key is null or expected_version not between 0 and 9007199254740991)
                then 'outbox_expected_version_is_of_a_key'
            when deliver_at < timestamptz '0001-01-01 00:00:00+00' or deliver_at >= timestamptz '10000-01-01 00:00:00+00'
                then 'outbox_deliver_at_has_a_four_digit_year'
            when headers is null then null
            when jsonb_typeof(headers) <> 'object' then 'outbox_headers_are_extension_attributes'
            when octet_length(headers::text) > 65536
                or jsonb_path_exists(headers, '$.keyvalue() ? (
                    !(@.key like_regex "^[a-z0-9]{1,20}$")
                    || @.key like_regex "^(specversion|id|source|type|subject|time|datacontenttype|dataschema|data|partitionkey|expectedversion|deliverat)$"
                    || !(@.value.type() == "string" || @.value.type() == "boolean" || @.value.type() == "number")
                    || (@.value.type() == "number"
                        && (@.value < -2147483648 || @.value > 2147483647 || @.value.floor() != @.value)))')
                then 'outbox_headers_are_extension_attributes'
        end;
    end if;
    if broken is not null then
        raise exception using errcode = 'check_violation', schema = 'postroad', table = 'outbox', constraint = broken,
            message = format('new row for relation "outbox" violates check constraint "%s"', broken);
    end if;
    return true;
end
$$;

create table postroad.outbox (
    -- Order inside a relay's step. Never used to find out what is new: a smaller number can commit later.
    seq bigint not null default nextval('postroad.outbox_seq'),
    -- The transaction that inserted the row: what the relay finds new rows by. Not granted to producers.
    xid xid8 not null default pg_current_xact_id(),
    -- The leaf: 8 of them, 300 seconds each, by the time at which the transaction began. Not granted to producers.
    bucket smallint not null default (floor(extract(epoch from now()) / 300)::bigint % 8)::smallint,
    topic text not null,
    -- The payload, in one of two columns: a bytea literal would eat the backslashes of a text. Neither means absent data, which
    -- is not the JSON `null`.
    payload text,
    payload_bytes bytea,
    -- Messages of one key keep the order in which their transactions held the key's row lock.
    key text,
    -- CloudEvents attributes. `type` absent means the topic; `time` absent means none.
    type text,
    id text not null default gen_random_uuid()::text,
    source text not null default '/postroad/outbox',
    subject text,
    -- CloudEvents datacontenttype. Absent: JSON if the payload is a valid JSON text, and bytes otherwise.
    content_type text,
    -- CloudEvents dataschema.
    data_schema text,
    -- CloudEvents extension attributes: a JSON object of strings, booleans and 32-bit integers.
    headers jsonb,
    time timestamptz default now(),
    -- Where the topic belongs to a keyed stream: how many messages the key must have had there. Otherwise the row does not go into
    -- the stream, and is listed as rejected.
    expected_version bigint,
    -- When the message is to enter its stream, a year ahead at most; in the past, or absent, at once.
    deliver_at timestamptz,

    -- What could not become a message is refused here, so that the producer learns it at once.
    constraint outbox_row_is_valid check (
        postroad.outbox_row_is_valid(
            topic, payload, payload_bytes, key, type, id, source, subject, content_type, data_schema, headers, time,
            expected_version, deliver_at)
    )
) partition by list (bucket);

comment on table postroad.outbox is
    'Insert messages here, in the transaction that changes what they tell about. Committed: delivered. Rolled back: never seen.';

-- The leaves have no autovacuum: it could only get in the way of the TRUNCATE, and an analyze of a tiny leaf has frozen bad plans.
create table postroad.outbox_0 partition of postroad.outbox for values in (0) with (autovacuum_enabled = false, toast.autovacuum_enabled = false);
create table postroad.outbox_1 partition of postroad.outbox for values in (1) with (autovacuum_enabled = false, toast.autovacuum_enabled = false);
create table postroad.outbox_2 partition of postroad.outbox for values in (2) with (autovacuum_enabled = false, toast.autovacuum_enabled = false);
create table postroad.outbox_3 partition of postroad.outbox for values in (3) with (autovacuum_enabled = false, toast.autovacuum_enabled = false);
create table postroad.outbox_4 partition of postroad.outbox for values in (4) with (autovacuum_enabled = false, toast.autovacuum_enabled = false);
create table postroad.outbox_5 partition of postroad.outbox for values in (5) with (autovacuum_enabled = false, toast.autovacuum_enabled = false);
create table postroad.outbox_6 partition of postroad.outbox for values in (6) with (autovacuum_enabled = false, toast.autovacuum_enabled = false);
create table postroad.outbox_7 partition of postroad.outbox for values in (7) with (autovacuum_enabled = false, toast.autovacuum_enabled = false);

-- The one index. Its being valid also tells the relay that a dump has been restored to its end: pg_restore makes indexes last.
create index outbox_xid on postroad.outbox (xid);

-- The relay's marks. A step that found rows commits one here before it appends them: a position whose mark is missing was made
-- in a future that this database has lost.
create table postroad.relay_mark (
    id uuid primary key,
    made_at timestamptz not null default clock_timestamp()
) with (autovacuum_enabled = false);

-- Up to which of a broker's positions rows have left by TRUNCATE: written by the transaction that empties a leaf. A broker
-- whose stored position has a lower number was restored from a backup, and no longer has messages that are gone from here.
create table postroad.relay_emptied (
    broker uuid primary key,
    number bigint not null,
    emptied_at timestamptz not null default clock_timestamp()
);

-- Called by a relay that found this database gone back in time (restored, failed over, crashed with transactions not yet
-- flushed). Rows that were restored from elsewhere can carry transaction ids that this cluster has not handed out yet, or has
-- handed out to a transaction that is still running: no snapshot would show them for a long time. They get the id of this
-- transaction instead. A row that this statement can see and whose id its snapshot cannot is such a row, and no other is: an
-- ordinary row is seen exactly when its id is. It also moves the sequence past the highest number in use, with room for the
-- numbers that are handed out meanwhile.
-- Owned by whoever installs it, since a relay's role may not update: fixed search_path, no parameters.
create function postroad.relay_restamp() returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    restamped bigint;
    highest bigint;
begin
    update postroad.outbox set xid = pg_current_xact_id()
        where xid >= pg_snapshot_xmin(pg_current_snapshot()) and not pg_visible_in_snapshot(xid, pg_current_snapshot());
    get diagnostics restamped = row_count;
    select max(seq) into highest from postroad.outbox;
    if highest >= (select case when is_called then last_value + 1 else last_value end from postroad.outbox_seq) then
        perform setval('postroad.outbox_seq', highest + 10000);
    end if;
    return restamped;
end
$$;
revoke all on function postroad.relay_restamp() from public;
