-- Redrives: dead letters on their way back into their queue.
create table postroad_broker.redrive (
    queue_id bigint not null references postroad_broker.queue (id) on delete cascade,
    id text not null,
    created_at timestamptz not null,
    -- Which letters: see dead_letter_fits.
    selection jsonb not null,
    -- Letters per second; null is as fast as the queue takes them.
    rate_per_second integer,
    status text not null default 'running',
    finished_at timestamptz,
    -- Letters that fitted when it began; null until they are counted.
    total bigint,
    redriven bigint not null default 0,
    skipped bigint not null default 0,
    late bigint not null default 0,
    -- Every letter at or below this offset was looked at.
    through_offset bigint not null default 0,
    primary key (queue_id, id),
    constraint redrive_status_known check (status in ('running', 'done', 'cancelled')),
    constraint redrive_rate_positive check (rate_per_second > 0)
);
create index redrive_created_at on postroad_broker.redrive (queue_id, created_at);
create index redrive_running on postroad_broker.redrive (queue_id) where status = 'running';

-- Whether a dead letter is one of those that a selection means: it fits each part that is there. A topic's pattern has
-- tokens of [A-Za-z0-9_-], `*` for one token, and `>` for one or more at the end.
create function postroad_broker.dead_letter_fits(letter postroad_broker.dead_letter, selection jsonb) returns boolean
language sql stable
begin atomic
    select (selection ->> 'ids' is null or selection -> 'ids' ? (letter.generation || '-' || letter."offset"))
        and (selection ->> 'cause' is null or letter.cause = selection ->> 'cause')
        and (selection ->> 'topic' is null or letter.topic ~ ('^' || replace(replace(replace(
            selection ->> 'topic', '.', '\.'), '*', '[^.]+'), '>', '.+') || '$'))
        and (selection ->> 'key' is null or letter.key = selection ->> 'key')
        and (selection ->> 'died_after' is null or letter.died_at > (selection ->> 'died_after')::timestamptz)
        and (selection ->> 'died_before' is null or letter.died_at < (selection ->> 'died_before')::timestamptz)
        and (selection ->> 'reason' is null or exists (
            select from jsonb_array_elements(letter.failures) f
            where position(selection ->> 'reason' in f ->> 'reason') > 0));
end;

-- Writes what redrives did, within the very group that journals it: at most one step for each redrive. A step is an object
-- of `id`; of a new redrive `created_at`, `selection` and `rate_per_second`; `total` once it is known; `through`,
-- `redriven`, `skipped` and `late` in all, so that
-- a step written again changes nothing; `offsets` of the letters brought back, `at` the moment; `status` at its end.
create function postroad_broker.write_redrives(queues bigint[], steps text[]) returns void
language plpgsql volatile set search_path = pg_catalog, pg_temp as $$
begin
    insert into postroad_broker.redrive (queue_id, id, created_at, selection, rate_per_second)
    select q.queue_id, s.id, s.created_at, s.selection, s.rate_per_second
    from unnest(queues, steps) q (queue_id, step),
        jsonb_to_record(q.step::jsonb) s (id text, created_at timestamptz, selection jsonb, rate_per_second integer)
    where s.created_at is not null and exists (select from postroad_broker.queue where queue.id = q.queue_id)
    on conflict (queue_id, id) do nothing;

    update postroad_broker.redrive r
    set through_offset = greatest(r.through_offset, s.through), total = coalesce(s.total, r.total),
        redriven = s.redriven, skipped = s.skipped, late = s.late,
        status = coalesce(s.status, r.status),
        finished_at = case when s.status is null then r.finished_at else s.at end
    from unnest(queues, steps) q (queue_id, step),
        jsonb_to_record(q.step::jsonb) s (
            id text, total bigint, through bigint, redriven bigint, skipped bigint, late bigint, status text, at timestamptz)
    where r.queue_id = q.queue_id and r.id = s.id;

    -- The places first: as parts of the join the planner may find all letters of a queue and keep those of the offset.
    with back as materialized (
        select q.queue_id, o."offset", s.id, s.at
        from unnest(queues, steps) q (queue_id, step),
            jsonb_to_record(q.step::jsonb) s (id text, at timestamptz, offsets bigint[]),
            unnest(s.offsets) o ("offset")
    )
    update postroad_broker.dead_letter d
    set redrive_id = b.id, redriven_at = b.at
    from back b
    where d.queue_id = b.queue_id and d."offset" = b."offset";
end $$;
