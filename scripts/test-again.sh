#!/usr/bin/env bash
# Runs the failed tests of a run once more, each alone: scripts/test-again.sh LOG. A test that waits for something can fail on a machine that
# others use at the same time. It is named here, so that somebody looks at it; a test that fails twice has failed. The torture draws
# its faults anew in each run, so a failure there is never run again.
set -euo pipefail
cd "$(dirname "$0")/.."
log=$1
most=3

# The test runner lists the failed tests of each target behind its second `failures:`, indented.
mapfile -t failed < <(awk '
    /^failures:$/ { split("", names); count = 0; next }
    /^    [A-Za-z0-9_:]+$/ { names[++count] = $1 }
    /^test result:/ { if (/FAILED/) for (i = 1; i <= count; i++) print names[i]; split("", names); count = 0 }
' "$log" | sort -u)
if [ ${#failed[@]} -eq 0 ]; then
    echo "the run failed, and no test of it: nothing to run again" >&2
    exit 1
fi
if [ ${#failed[@]} -gt $most ]; then
    printf '%s tests failed, which is no accident:\n' "${#failed[@]}" >&2
    printf '  %s\n' "${failed[@]}" >&2
    exit 1
fi
for name in "${failed[@]}"; do
    case $name in torture::*)
        echo "$name failed: its seed is in its output" >&2
        exit 1
        ;;
    esac
done
for name in "${failed[@]}"; do
    again=$(mktemp)
    if ! make test ARGS="--locked --lib --test it -- --exact $name" 2>&1 | tee "$again" || ! grep -q ' 1 passed' "$again"; then
        echo "$name failed twice" >&2
        exit 1
    fi
done
printf 'failed once and passed alone: %s\n' "${failed[@]}" >&2
