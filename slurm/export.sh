#!/bin/bash
# Make a model of a run: sbatch slurm/export.sh RUN --to FOLDER [option of d2v2ds.export ...]
# Submit from the checkout, or set D2V2DS_HOME to it.
#SBATCH --job-name=export
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=32G
#SBATCH --time=01:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

source "${D2V2DS_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
export_model "$@"
