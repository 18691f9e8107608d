-- Fencing for what a Postgres database holds: a transaction that acts for the holder of a lock says so by its token, and one that
-- comes after a later holder's is refused. Call it first in the transaction.

create schema if not exists postroad;

-- The highest token of each lock that was seen here.
create table postroad.fence (
    name text collate "C" primary key,
    token bigint not null,
    changed_at timestamptz not null default clock_timestamp()
) with (fillfactor = 50);

-- Raises PRF01 if a later holder of the lock has been here. Until the transaction ends, those of other holders wait for it: what
-- it writes is before what they write.
create function postroad.assert_fence(lock_name text, token bigint) returns void
language plpgsql volatile security definer set search_path = pg_catalog, pg_temp as $$
declare
    seen bigint;
begin
    if lock_name is null or token is null then
        raise exception 'assert_fence needs the name of a lock and a token' using errcode = 'null_value_not_allowed';
    end if;
    -- A conflicting row is locked whether it is changed or not.
    insert into postroad.fence as f (name, token) values (lock_name, assert_fence.token)
        on conflict (name) do update set token = excluded.token, changed_at = clock_timestamp()
        where f.token < excluded.token;
    select f.token into strict seen from postroad.fence f where f.name = lock_name;
    if seen > assert_fence.token then
        raise exception 'the lock % was held under token % since: token % is no longer its holder''s', lock_name, seen, assert_fence.token
            using errcode = 'PRF01', hint = 'Stop the work that was begun under this token, and acquire the lock again.';
    end if;
end $$;

revoke execute on function postroad.assert_fence(text, bigint) from public;
