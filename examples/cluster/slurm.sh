#!/usr/bin/env bash
# Four machines with eight GPUs each:   sbatch examples/cluster/slurm.sh
#
# Every machine needs the images, the teacher and stepwell in an environment (.venv here) at the same path. What is
# written, the first machine writes. A job that was ended by its time limit goes on where it was when it is
# submitted again, on any number of machines whose GPUs divide the batch size.
#SBATCH --job-name=stepwell
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=%x-%j.log
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=8

# The first task of srun is on the first machine, so the process that writes is there, too.
# shellcheck disable=SC2016
srun bash -c '
  .venv/bin/torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" --nproc-per-node "$SLURM_GPUS_ON_NODE" \
    --master-addr "$0" --master-port "$1" \
    -m stepwell compress \
    --teacher vit_base_patch16_224 --data /data/imagenet --keep 0.1 --out runs/vit-b-tenth \
    --batch-size 4096 --precision bf16 --workers 8
' "$first" "$port"
