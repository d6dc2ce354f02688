#!/bin/bash
# Pack images into shards: sbatch slurm/preprocess_image.sh [option of preprocessing.pack_images ...]
# From $D2V2DS_RAW/image to $D2V2DS_DATA/image; --input and --output change that. A rank per task, on any number of nodes.
# As a job array, sbatch --array=0-9, each task packs a tenth; then the same command without --array writes the index.
# Submit from the checkout, or set D2V2DS_HOME to it.
#SBATCH --job-name=preprocess_image
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=32
#SBATCH --cpus-per-task=1
#SBATCH --mem-per-cpu=2G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

source "${D2V2DS_HOME:-${SLURM_SUBMIT_DIR:-.}}/slurm/launch.sh"
preprocess preprocessing.pack_images --input "$D2V2DS_RAW/image" --output "$D2V2DS_DATA/image" "$@"
