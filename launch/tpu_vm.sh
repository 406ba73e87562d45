#!/usr/bin/env bash
# Runs one command on all hosts of a Cloud TPU VM slice.
#   launch/tpu_vm.sh [--dry-run] TPU_NAME ZONE --config=configs/stage2.py:8b --config.init_from=DIR --workdir=DIR
# Assumes: gcloud is logged in, every host has this checkout in ~/alto_jax with `pip install -e '.[tpu]'`, and the
# directories are on a mount that all hosts share.
set -euo pipefail

dry_run=false
if [ "${1:-}" = "--dry-run" ]; then dry_run=true; shift; fi
if [ "$#" -lt 3 ]; then
  echo "usage: launch/tpu_vm.sh [--dry-run] TPU_NAME ZONE ARGUMENTS_OF_alto_jax.main..." >&2
  exit 2
fi
name=$1
zone=$2
shift 2
remote="cd ~/alto_jax && python3 -m alto_jax.main --distributed=auto $(printf '%q ' "$@")"
command=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$remote")
if "$dry_run"; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
