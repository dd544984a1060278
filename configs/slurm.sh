#!/bin/bash
# Train under Slurm, on one machine or several, with a task for each GPU:
#
#     sbatch --nodes=2 configs/slurm.sh --config gpt2_1.5b.py
#
# Arguments go to train.py. Submit it from the repository, in a folder that all machines share, where `make train` has set
# up .venv. Two minutes before the time limit the run saves a checkpoint and ends. A job that Slurm requeues resumes.
#SBATCH --job-name=nanofuse
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out

set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
# Each task is a rank, and if one fails all end.
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 .venv/bin/python train.py "$@"
