#!/usr/bin/env bash
# Trains on the GPUs of several nodes under SLURM, with one process for each GPU:
#
#     sbatch experiments/tools/slurm.sh --num-seeds 5
#
# JAX gives each process the one GPU whose index is SLURM_LOCALID. So there must be as many tasks as
# GPUs, and each task must see all GPUs of its node: not --gpus-per-task, which hides the others.
#SBATCH --job-name=jaxkd
#SBATCH --nodes=2
#SBATCH --gpus-per-node=4
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --output=%x-%j.log
set -euo pipefail

# --coordinator auto reads the variables that srun sets for each task. The first process alone writes
# the run's folder, where the same command resumes if the time was up.
srun python -m experiments.two_cnns --coordinator auto --batch-size 1024 "$@"
