#!/bin/bash
# sbatch --nodes 2 --gpus-per-node 8 slurm.sh lora_all data=rows.jsonl output_dir=runs/first
# The environment, the rows and `output_dir` are on a disk that all nodes see; the same line goes on with a stopped run.
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun torchrun --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" \
    -m modeling_deepseek_moe.cli finetune "$@"
