#!/usr/bin/env bash
# Starts N processes of one run on this machine (a rehearsal of a cluster; on the CPU unless JAX_PLATFORMS is set).
#   launch/local.sh [--dry-run] N --config=configs/stage1.py:debug --workdir=DIR ...
# Every process gets the same arguments. If one fails, the others are stopped and its exit code is returned.
# RESTARTS=R: after any end but 0 (done), 2 (an error that stays) and 130 (interrupted) all are started again, up to R
# times, without those that were killed: with the most processes that divide N, so that the batch still divides.
set -euo pipefail

dry_run=false
if [ "${1:-}" = "--dry-run" ]; then dry_run=true; shift; fi
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh [--dry-run] N ARGUMENTS_OF_alto_jax.main..." >&2
  exit 2
fi
all=$1
shift
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
command=("${PYTHON:-python}" -m alto_jax.main --distributed=env "$@")
given=${ALTO_COORDINATOR:-}

pids=()
is_stopped=false
stop() { [ "${#pids[@]}" -eq 0 ] || kill "$@" "${pids[@]}" 2>/dev/null || true; }
trap 'is_stopped=true; stop' TERM INT
trap 'stop' EXIT

# Takes the processes that have ended out of pids. Of their exit codes `status` gets the first that is not 0, or 2, which
# is of one that knows why; `killed` counts those that were killed. (`wait -n` misses one that ended before it.)
reap() {
  local pid code left=()
  for pid in "${pids[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      left+=("$pid")
      continue
    fi
    code=0
    wait "$pid" 2>/dev/null || code=$?
    if [ "$code" -eq 2 ] || [ "$status" -eq 0 ]; then status=$code; fi
    if [ "$code" -eq 137 ]; then killed=$((killed + 1)); fi
  done
  pids=("${left[@]}")
}

# Waits until no process is left: those that do not end in a minute after they were told to are killed; in ten seconds
# where one of them was killed, as they wait for it at the step that all would save.
finish() {
  local waits=300
  [ "$killed" -eq 0 ] || waits=50
  "$is_stopped" || stop
  for ((i = 0; i < waits && ${#pids[@]} > 0; i++)); do
    sleep 0.2 || true
    reap
  done
  stop -KILL
  wait
  pids=()
}

count=$all
for ((attempt = 0; ; attempt++)); do
  export ALTO_NUM_PROCESSES="$count"
  export ALTO_COORDINATOR="${given:-127.0.0.1:$((20000 + RANDOM % 20000))}"
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
  status=0 killed=0
  while [ "${#pids[@]}" -gt 0 ] && [ "$status" -eq 0 ]; do
    sleep 0.2 || true
    reap
  done
  lost=$killed # before any is told to stop
  finish
  case "$status" in
    0 | 2 | 130) break ;;
  esac
  if "$is_stopped" || [ "$attempt" -ge "${RESTARTS:-0}" ]; then break; fi
  count=$((count - lost > 0 ? count - lost : 1))
  while [ $((all % count)) -ne 0 ]; do count=$((count - 1)); done
  echo "launch/local.sh: ended with $status, $lost killed; goes on with $count of $all processes" >&2
done
exit "$status"
