#!/bin/bash
# Pack recordings into shards: sbatch slurm/preprocess_audio.sh [option of preprocessing.pack_audio ...]
# From $D2V2DS_RAW/audio to $D2V2DS_DATA/audio; --input and --output change that. A rank per task, on any number of nodes.
# As a job array, sbatch --array=0-9, each task packs a tenth; then the same command without --array writes the index.
# Submit from the checkout, or set D2V2DS_HOME to it.
#SBATCH --job-name=preprocess_audio
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=32
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=2G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

source "${D2V2DS_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
preprocess preprocessing.pack_audio --input "$D2V2DS_RAW/audio" --output "$D2V2DS_DATA/audio" "$@"
