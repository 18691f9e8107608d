-- The fence. The tokens that were seen are forgotten with it.
do $postroad$
begin
    if to_regclass('postroad.fence') is null then
        return;
    end if;
    drop function postroad.assert_fence(text, bigint);
    drop table postroad.fence;
    delete from postroad.migration where version = 20261122003000;
end
$postroad$;
