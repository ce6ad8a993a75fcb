#!/usr/bin/env bash
# One run on a Slurm cluster, a process for each GPU. From the clone, with its virtual environment active:
#
#   sbatch launch/slurm.sh --config=vp_cifar --workdir=/shared/runs/cifar
#
# Edit: nodes, GPUs (twice: as many processes as GPUs), CPUs and time, here or as sbatch's own options, which go before the
# file's name; add --partition and --account where the cluster asks for them. The workdir is on a disk that all nodes share, and
# so are TFDS data sets: prepare them once, and export TFDS_DATA_DIR (a run without them prints the command).
#
#SBATCH --job-name=sde_diffusion
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
# Two minutes before the time is up the run saves a checkpoint (at its next line of metrics), exits with 143, and is queued
# again below. All of its output goes to one file.
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

# JAX finds the other processes by Slurm's variables, and takes GPU number SLURM_LOCALID of the node's: so every process must
# see all of them, which --gpus-per-task would prevent.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
srun --kill-on-bad-exit=1 python -m sde_diffusion.main "$@"
code=$?

# `scancel JOB` ends the run for good; `scancel --signal=TERM JOB` saves it and lets it go on, on other nodes maybe.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
