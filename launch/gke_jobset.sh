#!/usr/bin/env bash
# Runs one command on the hosts of a TPU slice on GKE, by launch/gke_jobset.yaml.
#   launch/gke_jobset.sh [--dry-run] IMAGE CLAIM --config=configs/stage2.py:8b --config.init_from=/runs/start --workdir=/runs/stage2
# Assumes: kubectl is set up for the cluster, the JobSet controller is installed there, IMAGE holds this package with
# its `tpu` extra, and CLAIM is a volume claim that all hosts may write; it is mounted as /runs. ACCELERATOR, TOPOLOGY,
# HOSTS and CHIPS (per host) choose the slice (tpu-v5-lite-podslice, 4x4, 4 and 4). --dry-run prints the manifest.
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
manifest=$(<"$(dirname "$0")/gke_jobset.yaml")
manifest=${manifest//@IMAGE@/"$image"}
manifest=${manifest//@CLAIM@/"$claim"}
manifest=${manifest//@ACCELERATOR@/"${ACCELERATOR:-tpu-v5-lite-podslice}"}
manifest=${manifest//@TOPOLOGY@/"${TOPOLOGY:-4x4}"}
manifest=${manifest//@HOSTS@/"${HOSTS:-4}"}
manifest=${manifest//@CHIPS@/"${CHIPS:-4}"}
manifest=${manifest//@ARGUMENTS@/"$arguments"}
if "$dry_run"; then
  echo "$manifest"
else
  kubectl apply -f - <<<"$manifest"
fi
