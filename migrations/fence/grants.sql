-- Grants of the role that works under locks. Without the role, no grants.
do $postroad$
declare
    fenced constant text := postroad.make_role('fenced');
begin
    if fenced is null then
        return;
    end if;
    execute format('grant usage on schema postroad to %I', fenced);
    execute format('grant execute on function postroad.assert_fence(text, bigint) to %I', fenced);
end
$postroad$;
