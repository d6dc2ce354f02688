#!/bin/bash
# Starts one rank of a run. The first one stands in for the job's script if that is killed.
#   rank.sh RUN COMMAND [ARGUMENT ...]
#
# In:  D2V2DS_SCRIPT, "NODE PID" of the job's script, and D2V2DS_HOME.
# Out: the exit code of the command.
#
# When the script alone is killed (SIGKILL, or the kernel for its memory), SLURM takes the job for failed: it sends TERM
# to the ranks, which save, and nobody is left to note the attempt and to requeue. SLURM requeues a job that is ending.

set -uo pipefail
run=$1
shift
read -r node script <<<"$D2V2DS_SCRIPT"
if [[ $SLURM_PROCID != 0 || $node != "${SLURMD_NODENAME-}" ]]; then exec "$@"; fi

trap : USR1 USR2 TERM HUP INT # the command gets them too, and they must not end this shell before it
"$@" &
rank=$! code=0
wait "$rank" || code=$?
while kill -0 "$rank" 2>/dev/null; do # `wait` also ends when a trap has run
    code=0
    wait "$rank" || code=$?
done
if kill -0 "$script" 2>/dev/null; then exit "$code"; fi

# shellcheck source=launch.sh
source "$D2V2DS_HOME/slurm/launch.sh"
say "the job's script was killed; rank 0 ended with $code and notes it"
finish_run "$run" "$code" KILL
exit "$code"
