#!/bin/bash
# Run a cell of a sweep in each task of a job array: sbatch --array=0-11 slurm/sweep.sh FILE.yaml [field=value ...]
# `python -m d2v2ds.sweep FILE.yaml --slurm` writes such a job with the number of its cells. A task is a node with the
# GPUs of one run; D2V2DS_SWEEP_CELL runs one cell without an array. Submit from the checkout, or set D2V2DS_HOME to it.
#SBATCH --job-name=sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

source "${D2V2DS_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
cell=${D2V2DS_SWEEP_CELL:-${SLURM_ARRAY_TASK_ID-}}
if [[ ! $cell ]]; then fail "expected a job array (--array=0-N), or D2V2DS_SWEEP_CELL"; fi
trap 'warn USR1' USR1
trap 'warn TERM' TERM
trap 'warn HUP' HUP
prepare
code=0
run_step srun --export=ALL --nodes=1 --ntasks=1 "${D2V2DS_SRUN[@]}" "${D2V2DS_PREFIX[@]}" \
    python -m d2v2ds.sweep "$@" --cell "$cell"
say "cell $cell ended with $code"
trap '' USR1 TERM HUP
if [[ $code == 75 ]]; then requeue "$warned"; fi
exit "$code"
