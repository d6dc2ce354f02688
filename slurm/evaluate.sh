#!/bin/bash
# Evaluate a fine-tuned run or export: sbatch slurm/evaluate.sh MODEL --shards DIR [option of d2v2ds.evaluate ...]
# Submit from the checkout, or set D2V2DS_HOME to it.
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=02:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

source "${D2V2DS_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
evaluate_model "$@"
