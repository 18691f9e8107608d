#!/usr/bin/env bash
# Shows that the tests find the faults planted for them: reads the table of docs/reliability.md, runs each test as it is, where it must
# pass, and with its fault, where it must fail in the words of the table. Prints what came of each. With arguments, only these faults.
set -euo pipefail
cd "$(dirname "$0")/.."
table=docs/reliability.md

cargo test --features failpoints --test it --no-run --quiet
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Whether the test passes.
run() {
    RUST_BACKTRACE=0 POSTROAD_MUTANT=$1 cargo test --features failpoints --test it --quiet -- --exact "$2" --test-threads 1 >"$log" 2>&1 || return 1
    # A name that is nobody's passes, too.
    grep -q '^test result: ok. 1 passed' "$log" || { echo "there is no test $2"; exit 1; }
}

failed=0
passed=" "
printf '%-26s %-8s %s\n' fault found by
while IFS='|' read -r _ fault _ test words _; do
    strip() { sed -E 's/^ *`?//; s/`? *$//' <<<"$1"; }
    fault=$(strip "$fault") test=$(strip "$test") words=$(strip "$words")
    [ $# -eq 0 ] || [[ " $* " == *" $fault "* ]] || continue
    if [[ $passed != *" $test "* ]]; then
        if ! run "" "$test"; then
            printf '%-26s %-8s %s\n' - FAILS "$test, without any fault:"
            tail -n 40 "$log"
            failed=1
            continue
        fi
        passed+="$test "
    fi
    if run "$fault" "$test"; then
        printf '%-26s %-8s %s\n' "$fault" NO "$test passes with it"
        failed=1
    elif ! grep -qF -- "$words" "$log"; then
        printf '%-26s %-8s %s\n' "$fault" NO "$test fails, but does not say \"$words\":"
        tail -n 40 "$log"
        failed=1
    else
        printf '%-26s %-8s %s\n' "$fault" yes "$test"
    fi
done < <(awk '/^## Planted faults/ { on = 1; next } /^## / { on = 0 } on && /^\| `/' "$table")
exit $failed
