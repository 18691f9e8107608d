-- The outbox: what producers insert into, inside their own transactions. Insert-only; its space comes back by TRUNCATE of
-- whole leaves, so nothing here is ever vacuumed for its dead rows, and a pinned xmin slows nothing down.

-- CACHE 1: a session that keeps numbers in stock would hand them out in another order than the row locks of its key.
create sequence postroad.outbox_seq as bigint cache 1;

-- Checks that a row of the outbox can become a message. A fault is raised under the name of the rule, as a separate constraint would
-- do. It is a function since constraints are read and planned anew by each statement that inserts: fourteen of them
-- took 90 of the 130 us of an insert of one row.
--
-- It has no search_path of its own: setting one and putting it back costs 4 us a row, of 12 in a large insert. So each name in it has its schema, operators
-- and types too, and nothing that another role plants in a schema of the producer's search_path runs as the producer.
create function postroad.outbox_row_is_valid(
    topic text, payload text, payload_bytes bytea, key text, type text, id text, source text, subject text, content_type text,
    data_schema text, headers jsonb, "time" timestamptz, expected_version bigint, deliver_at timestamptz
) returns boolean
language plpgsql immutable parallel safe as $$
declare
    -- A rule that is broken. Nulls break none.
    broken pg_catalog.text;
begin
    broken := case
        when pg_catalog.octet_length(topic) operator(pg_catalog.>) 255
            or topic collate pg_catalog."C" operator(pg_catalog.!~) '^[A-Za-z0-9_-]+([.][A-Za-z0-9_-]+)*$' then 'outbox_topic_is_valid'
        when pg_catalog.octet_length(payload) operator(pg_catalog.>) 16777216 then 'outbox_payload_is_at_most_16_mib'
        when pg_catalog.octet_length(key) operator(pg_catalog.<) 1 or pg_catalog.octet_length(key) operator(pg_catalog.>) 512
            then 'outbox_key_is_1_to_512_bytes'
        when pg_catalog.octet_length(id) operator(pg_catalog.<) 1 or pg_catalog.octet_length(id) operator(pg_catalog.>) 1024
            then 'outbox_id_is_1_to_1024_bytes'
        when pg_catalog.octet_length(source) operator(pg_catalog.<) 1 or pg_catalog.octet_length(source) operator(pg_catalog.>) 1024
            then 'outbox_source_is_1_to_1024_bytes'
        -- As over HTTP: CloudEvents has neither control characters nor noncharacters. One look at all three, put together by operators: by
        -- concat, which calls the types' output functions, it took 1.3 us in place of 0.5.
        when (id operator(pg_catalog.||) coalesce(key, '') operator(pg_catalog.||) coalesce(source, ''))
                operator(pg_catalog.~) '[\u0001-\u001f\u007f-\u009f\ufdd0-\ufdef\ufffe\uffff]'
            then 'outbox_attributes_have_no_control_characters'
        when "time" operator(pg_catalog.<) pg_catalog.timestamptz '0001-01-01 00:00:00+00'
            or "time" operator(pg_catalog.>=) pg_catalog.timestamptz '10000-01-01 00:00:00+00'
            then 'outbox_time_has_a_four_digit_year'
    end;
    if broken is null
        and pg_catalog.num_nonnulls(payload_bytes, type, subject, content_type, data_schema, headers, expected_version, deliver_at)
            operator(pg_catalog.>) 0
    then
        broken := case
            when payload is not null and payload_bytes is not null then 'outbox_payload_is_one'
            when pg_catalog.octet_length(payload_bytes) operator(pg_catalog.>) 16777216 then 'outbox_payload_is_at_most_16_mib'
            when pg_catalog.octet_length(type) operator(pg_catalog.<) 1 or pg_catalog.octet_length(type) operator(pg_catalog.>) 1024
                then 'outbox_type_is_1_to_1024_bytes'
            when pg_catalog.octet_length(subject) operator(pg_catalog.<) 1 or pg_catalog.octet_length(subject) operator(pg_catalog.>) 1024
                then 'outbox_subject_is_1_to_1024_bytes'
            when pg_catalog.octet_length(content_type) operator(pg_catalog.<) 1
                or pg_catalog.octet_length(content_type) operator(pg_catalog.>) 255
                or content_type collate pg_catalog."C" operator(pg_catalog.!~) '^[!-~]([ -~]*[!-~])?$'
                then 'outbox_content_type_is_valid'
            when (coalesce(type, '') operator(pg_catalog.||) coalesce(subject, '') operator(pg_catalog.||) coalesce(data_schema, ''))
                    operator(pg_catalog.~) '[\u0001-\u001f\u007f-\u009f\ufdd0-\ufdef\ufffe\uffff]'
                then 'outbox_attributes_have_no_control_characters'
            when pg_catalog.octet_length(data_schema) operator(pg_catalog.<) 1
                or pg_catalog.octet_length(data_schema) operator(pg_catalog.>) 1024
                then 'outbox_data_schema_is_1_to_1024_bytes'
            when expected_version is not null and (key is null or expected_version operator(pg_catalog.<) 0
                    or expected_version operator(pg_catalog.>) 9007199254740991)
                then 'outbox_expected_version_is_of_a_key'
            when expected_version is not null and deliver_at is not null then 'outbox_expected_version_is_of_now'
            when deliver_at operator(pg_catalog.<) pg_catalog.timestamptz '0001-01-01 00:00:00+00'
                or deliver_at operator(pg_catalog.>=) pg_catalog.timestamptz '10000-01-01 00:00:00+00'
                then 'outbox_deliver_at_has_a_four_digit_year'
            -- The JSON null is no header: some mappers of objects to tables write it where they mean none.
            when headers is null or pg_catalog.jsonb_typeof(headers) operator(pg_catalog.=) 'null' then null
            when pg_catalog.jsonb_typeof(headers) operator(pg_catalog.<>) 'object' then 'outbox_headers_are_extension_attributes'
            when pg_catalog.octet_length(headers::pg_catalog.text) operator(pg_catalog.>) 65536
                or pg_catalog.jsonb_path_exists(headers, '$.keyvalue() ? (
                    !(@.key like_regex "^[a-z0-9]{1,20}$")
                    || @.key like_regex "^(specversion|id|source|type|subject|time|datacontenttype|dataschema|data|partitionkey|expectedversion|deliverat)$"
                    || !(@.value.type() == "string" || @.value.type() == "boolean" || @.value.type() == "number")
                    || (@.value.type() == "string" && @.value like_regex "[\u0001-\u001f\u007f-\u009f\ufdd0-\ufdef\ufffe\uffff]")
                    || (@.value.type() == "number"
                        && (@.value < -2147483648 || @.value > 2147483647 || @.value.floor() != @.value)))')
                then 'outbox_headers_are_extension_attributes'
        end;
    end if;
    if broken is not null then
        raise exception using errcode = 'check_violation', schema = 'postroad', table = 'outbox', constraint = broken,
            message = pg_catalog.format('new row for relation "outbox" violates check constraint "%s"', broken);
    end if;
    return true;
end
$$;

-- A name as a segment of a URI: each byte that is not unreserved there as %XX.
create function postroad.uri_segment(name text) returns text
language sql immutable strict parallel safe
begin atomic
    select string_agg(
        case when b.code in (45, 46, 95, 126) or b.code between 48 and 57 or b.code between 65 and 90 or b.code between 97 and 122
            then chr(b.code) else '%' || upper(lpad(to_hex(b.code), 2, '0')) end, '' order by b.place)
    from (
        select get_byte(convert_to(name, 'UTF8'), n) as code, n as place
        from generate_series(0, octet_length(convert_to(name, 'UTF8')) - 1) as n
    ) as b;
end;

-- The CloudEvents `source` of rows that name none, which is the column's default too. Each install puts the database's name in both, as
-- constants: asked for in each insert, it would cost a tenth of it.
create function postroad.default_source() returns text
language sql immutable parallel safe
return '/postroad/outbox'::text;

create table postroad.outbox (
    -- Order inside a relay's step. Never used to find new rows: a smaller number can commit later.
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

    -- A row that could not become a message is refused here, so that the producer learns it at once.
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

-- Rows are updated only by a restamp, below. A publication for all tables, as tools for change data capture make, refuses an update where
-- there is nothing to tell the rows of a subscriber by. Costs inserts and TRUNCATE nothing.
alter table postroad.outbox replica identity full;
alter table postroad.outbox_0 replica identity full;
alter table postroad.outbox_1 replica identity full;
alter table postroad.outbox_2 replica identity full;
alter table postroad.outbox_3 replica identity full;
alter table postroad.outbox_4 replica identity full;
alter table postroad.outbox_5 replica identity full;
alter table postroad.outbox_6 replica identity full;
alter table postroad.outbox_7 replica identity full;

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
    broker uuid not null,
    -- The number of its origin: under another one it is another position.
    origin_id integer not null,
    number bigint not null,
    emptied_at timestamptz not null default clock_timestamp(),
    primary key (broker, origin_id)
);

-- When each leaf was emptied last, by the broker's clock: no row in it is older, so a re-relay need not look further back in the streams.
create table postroad.outbox_leaf (
    leaf smallint primary key,
    emptied_at timestamptz not null
);

-- Who relays this outbox, and who did. One at a time: two would each take away what the other has not read. The first that comes
-- writes itself down, and any other is refused until its claim is released.
create table postroad.relay_claim (
    -- The outbox itself.
    table_name text not null,
    broker uuid not null,
    -- The broker's number of its origin, which stays when the origin is given another name.
    origin_id integer not null,
    origin text not null,
    -- The history that the broker's database was in: a copy of it, with the same id, is in another.
    salt uuid not null,
    claimed_at timestamptz not null default clock_timestamp(),
    released_at timestamptz,
    primary key (table_name, broker, origin_id)
);
create unique index relay_claim_one on postroad.relay_claim (table_name) where released_at is null;

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
    restamped bigint := 0;
    highest bigint;
begin
    if exists (
        select from postroad.outbox
        where xid >= pg_snapshot_xmin(pg_current_snapshot()) and not pg_visible_in_snapshot(xid, pg_current_snapshot())
    ) then
        update postroad.outbox set xid = pg_current_xact_id()
            where xid >= pg_snapshot_xmin(pg_current_snapshot()) and not pg_visible_in_snapshot(xid, pg_current_snapshot());
        get diagnostics restamped = row_count;
    end if;
    select max(seq) into highest from postroad.outbox;
    if highest >= (select case when is_called then last_value + 1 else last_value end from postroad.outbox_seq) then
        perform setval('postroad.outbox_seq', highest + 10000);
    end if;
    return restamped;
end
$$;
revoke all on function postroad.relay_restamp() from public;
