#!/bin/bash
# Fine-tune on speech: sbatch slurm/finetune_audio.sh init.weights=EXPORT [--config NAME] [section.field=value ...]
# Shards come from $D2V2DS_DATA/audio_labelled, the run goes to $D2V2DS_RUNS/NAME; data.shards=, valid.audio= and
# run.dir= change that. Submit from the checkout, or set D2V2DS_HOME to it.
#SBATCH --job-name=finetune_audio
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
pretrain finetune/ctc_large_960h data.shards="$D2V2DS_DATA/audio_labelled" "$@"
