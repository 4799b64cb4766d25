#!/usr/bin/env bash
# Four machines with eight GPUs each:   sbatch examples/cluster/slurm.sh
#
# Explained in README.md beside this file. Submitted again, the run goes on where it was.
#SBATCH --job-name=stepwell
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

export SHARDS=/shared/imagenet-shards # the images, once for all machines
export LOCAL=/scratch/imagenet-shards # where each machine keeps a copy, on a disk of its own
export OMP_NUM_THREADS=8
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MEETING_POINT=$first:$((20000 + SLURM_JOB_ID % 20000))
export MEETING_POINT

# What is there already is not copied again. -a keeps times, so that the shards' index counts for the copy, too.
srun bash -c 'mkdir -p "$LOCAL" && cp -au "$SHARDS/." "$LOCAL"'

srun bash -c '
  .venv/bin/torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --rdzv-backend c10d --rdzv-endpoint "$MEETING_POINT" --rdzv-id "$SLURM_JOB_ID" \
    -m stepwell compress \
    --teacher vit_base_patch16_224 --data "$LOCAL" --keep 0.1 --out /shared/runs/vit-b-tenth \
    --batch-size 4096 --precision bf16 --workers 8
'
