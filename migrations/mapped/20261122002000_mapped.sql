-- What stands beside outboxes that are not Postroad's own: tables that an origin of the configuration maps. They are made by
-- `postroad install --map`, in the database of the mapped table, and the outbox of Postroad need not be there.

-- The mapped tables. A relay reads a table only when it is listed, and a function below touches no other.
create table postroad.mapped_outbox (
    -- With its schema, quoted where need be.
    table_name text primary key,
    -- The columns with the transaction's id and with the row's number; null where rows are picked up by deletion.
    xid_column text,
    seq_column text,
    installed_at timestamptz not null default clock_timestamp(),
    -- Who relays it: the first broker that did, and as which of its origins. Two would take rows from each other.
    broker uuid,
    origin text,
    claimed_at timestamptz,
    constraint mapped_outbox_is_claimed_whole check ((broker is null) = (origin is null) and (broker is null) = (claimed_at is null)),
    constraint mapped_outbox_has_both_or_none check ((xid_column is null) = (seq_column is null))
);

-- The relays' marks, as in postroad.relay_mark: a position whose mark is missing was made in a future that this database has lost.
create table postroad.mapped_mark (
    id uuid primary key,
    table_name text not null,
    made_at timestamptz not null default clock_timestamp()
);

-- Up to which of a broker's positions rows have left: written by the transaction that takes them out. A broker whose
-- stored position has a lower number was restored from a backup, and no longer has messages that are gone from here.
create table postroad.mapped_emptied (
    broker uuid not null,
    table_name text not null,
    number bigint not null,
    emptied_at timestamptz not null default clock_timestamp(),
    primary key (broker, table_name, number)
);

-- As postroad.relay_restamp, for a listed table: rows that came from another life of the database get an id of this one, and the
-- sequence of the numbers is moved past the highest. A relay's role may not update: owned by whoever installs, and the
-- names are those that whoever installs has listed.
create function postroad.mapped_restamp(mapped_table text) returns bigint
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    listed record;
    restamped bigint;
    highest bigint;
    numbers text;
    next_number bigint;
begin
    select m.table_name, m.xid_column, m.seq_column into listed
    from postroad.mapped_outbox as m where m.table_name = mapped_table and m.xid_column is not null;
    if not found then
        return 0;
    end if;
    execute format(
        'update %1$s set %2$I = pg_current_xact_id() where %2$I >= pg_snapshot_xmin(pg_current_snapshot()) '
        'and not pg_visible_in_snapshot(%2$I, pg_current_snapshot())', listed.table_name, listed.xid_column);
    get diagnostics restamped = row_count;
    numbers := pg_get_serial_sequence(listed.table_name, listed.seq_column);
    if numbers is not null then
        execute format('select max(%I) from %s', listed.seq_column, listed.table_name) into highest;
        execute format('select case when is_called then last_value + 1 else last_value end from %s', numbers) into next_number;
        if highest >= next_number then
            perform setval(numbers::regclass, highest + 10000);
        end if;
    end if;
    return restamped;
end
$$;
revoke all on function postroad.mapped_restamp(text) from public;
