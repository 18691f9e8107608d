-- Grants of the consumers' role. Without the role, no grants.
do $postroad$
declare
    consumer constant text := postroad.make_role('consumer');
begin
    if consumer is null then
        return;
    end if;
    execute format('grant usage on schema postroad to %I', consumer);
    execute format('grant execute on function postroad.inbox_accept(text, text, text, bigint) to %I', consumer);
end
$postroad$;
