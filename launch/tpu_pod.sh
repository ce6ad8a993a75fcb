#!/usr/bin/env bash
# One run on all workers of a Cloud TPU pod slice, a process for each worker:
#
#   launch/tpu_pod.sh --config=vp_cifar --workdir=/shared/runs/cifar
#   launch/tpu_pod.sh stop
#
# `stop` lets the run save a checkpoint; the same command goes on from there, as it does after a lost machine. The run hangs on
# this connection: start it in tmux, on a machine that stays on.
#
# Edit: the slice, its zone, and a clone on a disk that all workers mount under one name (Filestore, say), where the workdir
# belongs too. In the clone, from one worker: python3 -m venv .venv && .venv/bin/pip install -e '.[tpu]'
# TFDS data sets are prepared once, into the folder below (a run without them prints the command, which needs the extra 'prepare').
TPU=my-slice
ZONE=us-central2-b
CLONE=/shared/sde_diffusion
DATA=/shared/tfds

set -euo pipefail

on_all_workers() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

if [ "${1:-}" = stop ]; then
  # The brackets keep pkill from the shell that runs it.
  on_all_workers "pkill -TERM -f '[s]de_diffusion.main'"
else
  # A second shell reads the arguments; JAX finds the other workers by the slice's metadata.
  arguments=$(printf ' %q' "$@")
  on_all_workers "cd $CLONE && TFDS_DATA_DIR=$DATA exec .venv/bin/python -m sde_diffusion.main --distributed$arguments"
fi
