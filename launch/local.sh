#!/usr/bin/env bash
# Starts N processes of one run on this machine (a rehearsal of a cluster; on the CPU unless JAX_PLATFORMS is set).
#   launch/local.sh [--dry-run] N --config=configs/stage1.py:debug --workdir=DIR ...
# Every process gets the same arguments. If one fails, the others are stopped and its exit code is returned.
set -euo pipefail

dry_run=false
if [ "${1:-}" = "--dry-run" ]; then dry_run=true; shift; fi
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh [--dry-run] N ARGUMENTS_OF_alto_jax.main..." >&2
  exit 2
fi
count=$1
shift
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
export ALTO_NUM_PROCESSES="$count"
export ALTO_COORDINATOR="${ALTO_COORDINATOR:-127.0.0.1:$((20000 + RANDOM % 20000))}"
command=("${PYTHON:-python}" -m alto_jax.main --distributed=env "$@")

pids=()
trap '[ "${#pids[@]}" -eq 0 ] || kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < count; i++)); do
  if "$dry_run"; then
    printf 'ALTO_COORDINATOR=%q ALTO_NUM_PROCESSES=%q ALTO_PROCESS_ID=%q' "$ALTO_COORDINATOR" "$count" "$i"
    printf ' %q' "${command[@]}"
    printf '\n'
  else
    ALTO_PROCESS_ID="$i" "${command[@]}" &
    pids+=("$!")
  fi
done
status=0
for ((i = 0; i < ${#pids[@]}; i++)); do
  wait -n || { status=$?; break; }
done
exit "$status"
