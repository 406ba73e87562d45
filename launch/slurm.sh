#!/usr/bin/env bash
#SBATCH --job-name=alto_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@180
# One process per GPU on SLURM nodes. Assumes: a shared file system for the workdir, an environment that has
# `pip install -e '.[cuda]'`, and this checkout as the working directory.
#   sbatch [--nodes=N] launch/slurm.sh --config=configs/stage2.py:8b --config.init_from=DIR --workdir=DIR
#   launch/slurm.sh --dry-run ...          prints the command instead
# Three minutes before the time limit the run saves and ends with exit code 75, and the job is queued again; it goes on
# from there, as a job does that SLURM itself queues again. So it is after any other end, such as a lost node, but for 0
# (done), 2 (an error that stays: bad input, or config.train.max_restarts starts without a new checkpoint) and 130
# (interrupted), up to MAX_RESTARTS (100) times.
set -euo pipefail

dry_run=false
if [ "${1:-}" = "--dry-run" ]; then dry_run=true; shift; fi
if [ "$#" -eq 0 ]; then
  echo "usage: sbatch launch/slurm.sh ARGUMENTS_OF_alto_jax.main..." >&2
  exit 2
fi
command=(srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m alto_jax.main --distributed=auto "$@")
if "$dry_run"; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
status=0
"${command[@]}" || status=$?
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
