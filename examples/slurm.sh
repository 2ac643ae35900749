#!/usr/bin/env bash
# A job of SLURM on several machines: one task for each GPU. Start it with: sbatch examples/slurm.sh
# A minute before the time is up SLURM sends SIGUSR1: fastkd saves its state and ends with status 75, and the job is
# queued again. --resume auto then goes on. Set partition, account, time and the options of fastkd to yours.
#SBATCH --job-name=fastkd
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@60
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

DATA=${DATA:-/data/imagenet}
OUT=${OUT:-runs/r18}
PYTHON=${PYTHON:-.venv/bin/python}

# All tasks must be able to read DATA and to read and write OUT. -b is per task.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" "$PYTHON" -m fastkd train --data "$DATA" --out "$OUT" --resume auto \
    --student timm/resnet18 --teacher timm/resnet50 --teacher-weights pretrained \
    --temperature 1 --ce-weight 0.5 --kd-weight 0.5 --epochs 100 -b 128 --lr 0.8 --warmup-epochs 5 "$@"
status=$?
if [ "$status" -eq 75 ]; then # stopped by a signal; what was trained is saved
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
