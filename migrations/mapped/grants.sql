-- Grants of the relay's role beside mapped tables. Without the role, no grants.
do $postroad$
declare
    relay constant text := postroad.make_role('relay');
begin
    if relay is null then
        return;
    end if;
    execute format('grant usage on schema postroad to %I', relay);
    execute format('grant select on postroad.mapped_outbox, postroad.migration to %I', relay);
    execute format('grant select, insert, update on postroad.mapped_claim to %I', relay);
    execute format('grant select, insert, delete on postroad.mapped_mark to %I', relay);
    execute format('grant select, insert, delete on postroad.mapped_emptied to %I', relay);
    execute format('grant execute on function postroad.mapped_code(text, text), postroad.mapped_guard(text, text), postroad.mapped_restamp(text) to %I', relay);
end
$postroad$;
