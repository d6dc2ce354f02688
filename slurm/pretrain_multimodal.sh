#!/bin/bash
# Pretrain on speech, images and text in one step: sbatch slurm/pretrain_multimodal.sh [--config NAME] \
#     model.modalities.text.vocab_size=N [section.field=value ...]
# Shards come from $D2V2DS_DATA/audio, image and text, the run goes to $D2V2DS_RUNS/NAME; data.audio.shards= and so on
# and run.dir= change that. Submit from the checkout, or set D2V2DS_HOME to it.
#SBATCH --job-name=pretrain_multimodal
#SBATCH --nodes=2
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
pretrain multimodal_large data.audio.shards="$D2V2DS_DATA/audio" data.image.shards="$D2V2DS_DATA/image" \
    data.text.shards="$D2V2DS_DATA/text" "$@"
