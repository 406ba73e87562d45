#!/usr/bin/env bash
#SBATCH --job-name=alto_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --no-kill
#SBATCH --signal=TERM@180
# One process per GPU on SLURM nodes. Assumes: a shared file system for the workdir, an environment that has
# `pip install -e '.[cuda]'`, and this checkout as the working directory. Every process must see all GPUs of its node, of
# which JAX takes the one of the process's number there: no --gpus-per-task, no binding.
#   sbatch [--nodes=N] launch/slurm.sh --config=configs/stage2.py:8b --config.init_from=DIR --workdir=DIR
#   launch/slurm.sh --dry-run ...          prints the command instead
# Three minutes before the time limit the run saves and ends with exit code 75, and the job is queued again; it goes on
# from there, as a job does that SLURM itself queues again. So it is after any other end, such as a lost node, but for 0
# (done), 2 (an error that stays: bad input, or config.train.max_restarts starts without a new checkpoint) and 130
# (interrupted), up to MAX_RESTARTS (100) times.
# MIN_NODES=N: where nodes were lost and N are left, the run goes on at once with what is left: with the most nodes that
# divide those it began with, so that the batch still divides. Default: all nodes, so it waits in the queue for as many.
set -euo pipefail

dry_run=false
if [ "${1:-}" = "--dry-run" ]; then dry_run=true; shift; fi
if [ "$#" -eq 0 ]; then
  echo "usage: sbatch launch/slurm.sh ARGUMENTS_OF_alto_jax.main..." >&2
  exit 2
fi
command=("${PYTHON:-python}" -m alto_jax.main --distributed=auto "$@")
all=${SLURM_JOB_NUM_NODES:-1}
if "$dry_run"; then
  printf '%q ' srun --kill-on-bad-exit=1 --gpu-bind=none "${command[@]}"
  echo
  exit 0
fi

# The nodes of this job that answer, one a line.
answering() {
  sinfo --noheader --Node --responding --nodes="$SLURM_JOB_NODELIST" --states=allocated,mixed,idle --format=%N | sort -u
}

# One step. Its `status` is 2 where one of the processes ended with 2: srun's own code is the highest of all, and with the
# first that fails srun kills the others (137, 143), who may not have come to the same error yet.
exec 3>&1 4>&2
said='^srun: error: .*: Exited with exit code 2$'
step() {
  local twos
  status=0
  twos=$({ srun --kill-on-bad-exit=1 --gpu-bind=none "$@" 2> >(tee >(grep -cE "$said" >&5) >&4); } 5>&1 >&3) || status=$?
  if [ "$status" -ne 0 ] && [ "${twos:-0}" -gt 0 ]; then status=2; fi
}

where=()
count=$all
while true; do
  step "${where[@]}" "${command[@]}"
  case "$status" in
    0 | 2 | 75 | 130) break ;;
  esac
  [ "${MIN_NODES:-$all}" -lt "$count" ] || break
  mapfile -t left < <(answering)
  # Note: as many as were there before means that none was lost; then the queue decides.
  [ "${#left[@]}" -lt "$count" ] && [ "${#left[@]}" -ge "$MIN_NODES" ] || break
  count=${#left[@]}
  while [ $((all % count)) -ne 0 ]; do count=$((count - 1)); done
  [ "$count" -ge "$MIN_NODES" ] || break
  left=("${left[@]:0:count}")
  where=("--nodes=$count" "--ntasks=$((count * ${SLURM_NTASKS_PER_NODE:-8}))" "--nodelist=$(IFS=,; echo "${left[*]}")")
  echo "launch/slurm.sh: ended with $status; goes on with $count of $all nodes: ${left[*]}" >&2
done
case "$status" in
  0 | 2 | 130) ;;
  *)
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "${MAX_RESTARTS:-100}" ]; then
      echo "launch/slurm.sh: ended with $status after ${SLURM_RESTART_COUNT:-0} restarts; not queued again (MAX_RESTARTS)" >&2
    elif [ -n "${SLURM_JOB_ID:-}" ]; then
      scontrol requeue "$SLURM_JOB_ID"
    fi
    ;;
esac
exit "$status"
