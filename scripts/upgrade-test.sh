#!/usr/bin/env bash
# Builds the program of another revision and has it run beside the present one, on one database and under load: tests/it/upgrade.rs.
# The revision is the first argument, HEAD~1 without; it is built in a worktree of its own, which is removed, with a target folder
# that is kept (POSTROAD_UPGRADE_TARGET, target/upgrade without).
set -euo pipefail
cd "$(dirname "$0")/.."

revision=$(git rev-parse --verify "${1:-HEAD~1}^{commit}")
target=${POSTROAD_UPGRADE_TARGET:-$PWD/target/upgrade}
folder=$(mktemp -d "${TMPDIR:-/tmp}/postroad-upgrade.XXXXXX")
trap 'git worktree remove --force "$folder/tree" 2>/dev/null || true; rm -rf "$folder"' EXIT

changed=$(git diff --name-only --diff-filter=MDR "$revision" -- migrations/broker migrations/origin ':!migrations/*/grants.sql')
if [ -n "$changed" ]; then
    echo "between $(git rev-parse --short "$revision") and now these landed migrations were changed, so that no database of the one can be used by the other:" >&2
    echo "$changed" >&2
    exit 1
fi

git worktree add --quiet --detach "$folder/tree" "$revision"
echo "building $(git log -1 --format='%h %s' "$revision")"
(cd "$folder/tree" && CARGO_TARGET_DIR=$target cargo build --quiet --bin postroad)
cp "$target/debug/postroad" "$folder/postroad"
chmod 755 "$folder" "$folder/postroad"
POSTROAD_TEST_OLD_PROGRAM=$folder/postroad cargo test --features failpoints --test it upgrade:: -- --nocapture
