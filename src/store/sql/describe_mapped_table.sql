-- A table's columns, one row each, with what is the same for all of them: its name, its primary key, and what this user may do
-- with it. $1 is the name as SQL writes it. Of a domain, the type below it counts.
select
    format('%I.%I', n.nspname, c.relname) as table_name,
    format('%I', n.nspname) as schema_name,
    c.relkind::text as relkind,
    a.attname::text as column_name,
    format_type(a.atttypid, a.atttypmod) as type_name,
    coalesce(b.typname, t.typname)::text as base_type,
    coalesce(b.typcategory, t.typcategory)::text as category,
    a.attnotnull as is_not_null,
    pg_get_expr(d.adbin, d.adrelid) as default_text,
    exists (
        select from pg_catalog.pg_index as i
        where i.indrelid = c.oid and i.indisvalid and i.indpred is null and i.indkey[0] = a.attnum
    ) as leads_index,
    coalesce(k.names, '{}') as primary_key,
    coalesce(k.types, '{}') as primary_key_types,
    has_table_privilege(c.oid, 'select') as may_select,
    has_table_privilege(c.oid, 'delete') as may_delete,
    row_security_active(c.oid) as hides_rows
from pg_catalog.pg_class as c
join pg_catalog.pg_namespace as n on n.oid = c.relnamespace
join pg_catalog.pg_attribute as a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
join pg_catalog.pg_type as t on t.oid = a.atttypid
left join pg_catalog.pg_type as b on b.oid = t.typbasetype
left join pg_catalog.pg_attrdef as d on d.adrelid = c.oid and d.adnum = a.attnum
left join lateral (
    select array_agg(p.attname::text order by u.place) as names,
        -- What a key is compared as. A domain's checks are its owner's.
        array_agg(
            case y.typtype when 'd' then format_type(y.typbasetype, y.typtypmod) else format_type(p.atttypid, p.atttypmod) end
            order by u.place) as types
    from pg_catalog.pg_index as i
    cross join unnest(i.indkey::smallint[]) with ordinality as u (number, place)
    join pg_catalog.pg_attribute as p on p.attrelid = i.indrelid and p.attnum = u.number
    join pg_catalog.pg_type as y on y.oid = p.atttypid
    where i.indrelid = c.oid and i.indisprimary and u.place <= i.indnkeyatts
) as k on true
where c.oid = to_regclass($1)
order by a.attnum
