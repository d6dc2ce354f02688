#!/bin/bash
# Fine-tune on images: sbatch slurm/finetune_image.sh init.weights=EXPORT [--config NAME] [section.field=value ...]
# Shards come from $D2V2DS_DATA/image_labelled, the run goes to $D2V2DS_RUNS/NAME; data.shards=, valid.image= and
# run.dir= change that. Submit from the checkout, or set D2V2DS_HOME to it.
#SBATCH --job-name=finetune_image
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

source "${D2V2DS_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
pretrain finetune/image_classify_large data.shards="$D2V2DS_DATA/image_labelled" "$@"
