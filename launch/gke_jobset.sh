#!/usr/bin/env bash
# Runs one command on GKE: on the hosts of TPU slices, by launch/gke_jobset.yaml, or on GPU machines, by
# launch/gke_gpu_jobset.yaml.
#   launch/gke_jobset.sh [--dry-run] IMAGE CLAIM --config=configs/stage2.py:8b --config.init_from=/runs/start --workdir=/runs/stage2
# Assumes: kubectl is set up for the cluster, the JobSet controller is installed there, IMAGE holds this package with
# its `tpu` (or `cuda`) extra, and CLAIM is a volume claim that all hosts may write; it is mounted as /runs. ACCELERATOR,
# TOPOLOGY, HOSTS and CHIPS (per host) choose the slice (tpu-v5-lite-podslice, 4x4, 4 and 4), SLICES how many of them (1);
# for GPUs ACCELERATOR=nvidia-h100-80gb (or another name that begins with nvidia-), HOSTS (2) and CHIPS (8) choose the
# machines. --dry-run prints the manifest.
set -euo pipefail

dry_run=false
if [ "${1:-}" = "--dry-run" ]; then dry_run=true; shift; fi
if [ "$#" -lt 3 ]; then
  echo "usage: launch/gke_jobset.sh [--dry-run] IMAGE CLAIM ARGUMENTS_OF_alto_jax.main..." >&2
  exit 2
fi
image=$1
claim=$2
shift 2
arguments=""
for argument in "$@"; do
  escaped=${argument//\\/\\\\}
  arguments+=", \"${escaped//\"/\\\"}\""
done
case "${ACCELERATOR:=tpu-v5-lite-podslice}" in
  nvidia-*) file=gke_gpu_jobset.yaml hosts=${HOSTS:-2} chips=${CHIPS:-8} ;;
  *) file=gke_jobset.yaml hosts=${HOSTS:-4} chips=${CHIPS:-4} ;;
esac
manifest=$(<"$(dirname "$0")/$file")
manifest=${manifest//@IMAGE@/"$image"}
manifest=${manifest//@CLAIM@/"$claim"}
manifest=${manifest//@ACCELERATOR@/"$ACCELERATOR"}
manifest=${manifest//@TOPOLOGY@/"${TOPOLOGY:-4x4}"}
manifest=${manifest//@SLICES@/"${SLICES:-1}"}
manifest=${manifest//@HOSTS@/"$hosts"}
manifest=${manifest//@CHIPS@/"$chips"}
manifest=${manifest//@ARGUMENTS@/"$arguments"}
if "$dry_run"; then
  echo "$manifest"
else
  # Note: `apply` would leave a JobSet that has ended as it is, say "unchanged", and start nothing.
  kubectl create -f - <<<"$manifest" || {
    echo "launch/gke_jobset.sh: not started; one that has ended is in the way until: kubectl delete jobset alto-jax" >&2
    exit 1
  }
fi
