# shellcheck shell=bash
# Shared body of the job scripts: they `source` it, it is not submitted itself.
#
# In:  what SLURM sets in a job, the site values below, the arguments behind the script's name.
# Out: the functions `pretrain`, `preprocess`, `export_model` and `evaluate_model`, of which a script calls one.
#
# Arguments are passed on as words and never evaluated, so spaces, quotes and `$` in them are only characters.

set -euo pipefail
: "${SLURM_JOB_ID:?submit this script with sbatch}"
job=$SLURM_JOB_ID # name for squeue and scontrol; that of one task, for the last one's number is that of its array too
if [[ ${SLURM_ARRAY_TASK_ID-} ]]; then job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
D2V2DS_HOME=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)

# ------------------------------------------------------------------ site values
# Change them in slurm/site.env, of which site.env.example is a template; git does not know that file.
# Partition and account are read by sbatch before this file is: that template says how they are given.

D2V2DS_MODULES=()                # `module load` these
D2V2DS_VENV=$D2V2DS_HOME/.venv   # Python environment to activate; empty for none
D2V2DS_PREFIX=()                 # words before `python`, such as those that enter a container
D2V2DS_SRUN=()                   # more options of srun
D2V2DS_MPI=pmi2                  # how packers find their MPI ranks; `srun --mpi=list` names the others
# shellcheck disable=SC2034 # the scripts use them
D2V2DS_RAW=$D2V2DS_HOME/raw      # raw data: audio/, image/, text/
# shellcheck disable=SC2034
D2V2DS_DATA=$D2V2DS_HOME/data    # packed shards: audio/, image/, text/
D2V2DS_RUNS=$D2V2DS_HOME/runs    # a folder for each run, named like its configuration

D2V2DS_SITE=${D2V2DS_SITE:-$D2V2DS_HOME/slurm/site.env}
# shellcheck source=/dev/null
if [[ -f $D2V2DS_SITE ]]; then source "$D2V2DS_SITE"; fi

# ------------------------------------------------------------------ helpers

say() { printf '%(%F %T)T job %s: %s\n' -1 "$SLURM_JOB_ID" "$*"; }

fail() {
    say "error: $*" >&2
    exit 2
}

# Modules, Python and the numbers that tasks need to find each other.
prepare() {
    set +u # other people's scripts
    if ((${#D2V2DS_MODULES[@]})); then module load "${D2V2DS_MODULES[@]}"; fi
    # shellcheck source=/dev/null
    if [[ $D2V2DS_VENV ]]; then source "$D2V2DS_VENV/bin/activate"; fi
    set -u
    export PYTHONPATH="$D2V2DS_HOME${PYTHONPATH:+:$PYTHONPATH}" # the code beside these scripts
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    # since 22.05 srun does not take it over from sbatch by itself
    if [[ ${SLURM_CPUS_PER_TASK-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
}

# The first node of the job, and a port that two jobs on one node do not share.
rendezvous() {
    local nodes
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    export MASTER_ADDR=${nodes[0]:?scontrol cannot expand the node list $SLURM_JOB_NODELIST}
    export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
}

# ------------------------------------------------------------------ cells of a sweep
# A job array over a file with one cell in each line: task N takes cell N, counted from 0. Empty lines and lines that
# begin with # are left out. Words of a line are divided by blanks, and never evaluated.

cell=() cell_name=''

#   read_cell FILE; sets the words of this task's cell and a name made of them, for the cell's folder
read_cell() {
    local line names=() cells=() number
    [[ ${SLURM_ARRAY_TASK_ID-} ]] || fail "--cells $1: expected a job array, found none; add sbatch --array=0-N"
    [[ -f $1 && -r $1 ]] || fail "--cells $1: expected a file that can be read, found none"
    while IFS= read -r line || [[ $line ]]; do
        read -ra cell <<<"${line%$'\r'}"
        if ((${#cell[@]})) && [[ ${cell[0]} != \#* ]]; then
            cells+=("${line%$'\r'}")
            printf -v line '%s,' "${cell[@]#--}"
            names+=("${line%,}")
        fi
    done <"$1"
    number=$SLURM_ARRAY_TASK_ID
    ((number < ${#cells[@]})) || fail "--cells $1: expected tasks from 0 to $((${#cells[@]} - 1)), found task $number"
    names=("${names[@]//[^A-Za-z0-9._=,+-]/_}")
    line=${names[number]}
    unset "names[number]"
    for number in "${!names[@]}"; do
        if [[ ${names[number]} == "$line" ]]; then fail "--cells $1: cells $SLURM_ARRAY_TASK_ID and $number are alike"; fi
    done
    ((${#line} <= 200)) || fail "--cells $1: expected at most 200 letters in a cell, found ${#line}: $line"
    read -ra cell <<<"${cells[SLURM_ARRAY_TASK_ID]}"
    cell_name=$line
}

# ------------------------------------------------------------------ signals
# USR1, HUP or TERM to this shell become USR1 to srun, which passes it to every rank: all save and exit with 75. (TERM
# would make srun end the step.) TERM is what SLURM sends last, KillWait seconds before it kills: ranks that were warned
# before and are still not done must not keep this shell from putting the job back into the queue.

warned='' interrupted='' step=''

warn() {
    interrupted=1
    if [[ $1 == TERM && $warned && $step ]]; then
        say "got SIGTERM, and ranks warned by SIG$warned have not ended; not waiting for them"
        kill -KILL "$step" 2>/dev/null || true
    else
        warned=$1
        say "got SIG$1; asking all ranks to save"
        if [[ $step ]]; then kill -USR1 "$step" 2>/dev/null || true; fi
    fi
}

# Run a command in the background, where a trap runs at once; the result is its own exit status in `code`.
run_step() {
    "$@" </dev/null &
    step=$!
    if [[ $warned ]]; then kill -USR1 "$step" 2>/dev/null || true; fi # warned before there was anyone to tell
    interrupted=1
    while [[ $interrupted ]]; do # `wait` also ends when a trap has run
        interrupted='' code=0
        wait "$step" || code=$?
    done
    step=''
}

# ------------------------------------------------------------------ what scripts call

# Train, and go back into the queue if the run is not finished and can go on.
#   pretrain CONFIG [section.field=value ...] [--cells FILE]; a later `--config NAME` or value wins, a cell's over all
pretrain() {
    local config=$1 run='' overrides=() log code=0 restart=${SLURM_RESTART_COUNT:-0}
    shift
    while (($#)); do
        case $1 in
        --config) config=${2:?--config needs a name} && shift ;;
        --config=*) config=${1#*=} ;;
        --cells) read_cell "${2:?--cells needs a file}" && shift ;;
        --cells=*) read_cell "${1#*=}" ;;
        run.dir=*) run=${1#*=} ;;
        *) overrides+=("$1") ;;
        esac
        shift
    done
    overrides+=("${cell[@]}")
    run=${run:-$D2V2DS_RUNS/$config}${cell_name:+/$cell_name}
    if [[ ${SLURM_ARRAY_TASK_ID-} && ! $cell_name ]]; then
        fail "expected --cells FILE in a job array, found none: all tasks would train in $run"
    fi
    if [[ ${SLURM_GPUS_ON_NODE:-0} != 0 && ${SLURM_NTASKS_PER_NODE-} != "$SLURM_GPUS_ON_NODE" ]]; then
        fail "expected a task for each GPU, found --ntasks-per-node=${SLURM_NTASKS_PER_NODE-}" \
            "and $SLURM_GPUS_ON_NODE GPUs on a node; give both options the same number"
    fi
    trap 'warn USR1' USR1
    trap 'warn TERM' TERM
    trap 'warn HUP' HUP
    prepare
    rendezvous
    export D2V2DS_HOME D2V2DS_SCRIPT="${SLURMD_NODENAME-} $$" # for rank.sh
    mkdir -p -- "$run/logs" || fail "run.dir $run cannot be made"
    log=$run/logs/job$SLURM_JOB_ID.restart$restart.log
    say "restart $restart on $SLURM_JOB_NODELIST, $SLURM_NTASKS ranks; what they say: $log"
    if [[ $warned ]]; then
        say "not started, for the job is about to end"
        code=75
    else
        # A rank that ends must not have the others killed, for all ranks end with 75 one after another; but one that is
        # left alone hangs, so that the step ends a minute after the first rank.
        run_step srun --export=ALL --kill-on-bad-exit=0 --wait=60 --label --open-mode=append --output="${log//%/%%}" \
            "${D2V2DS_SRUN[@]}" bash "$D2V2DS_HOME/slurm/rank.sh" "$run" "${D2V2DS_PREFIX[@]}" \
            python -m d2v2ds.pretrain --config "$config" "${overrides[@]}" run.dir="$run"
        say "ranks ended with $code"
    fi
    trap '' USR1 TERM HUP
    finish_run "$run" "$code" "$warned"
    exit "$code"
}

# Note how the run ended, and requeue the job if it can go on.
#   finish_run RUN CODE SIGNAL; the signal that warned the run, KILL if it killed the job's script, or nothing
finish_run() {
    local verdict
    verdict=$("${D2V2DS_PREFIX[@]}" python -m d2v2ds.run.restart --run "$1" --code "$2" --job "$SLURM_JOB_ID" \
        --restart "${SLURM_RESTART_COUNT:-0}" --warned "$3") || say "no verdict, so this job stops"
    if [[ $verdict == requeue ]]; then requeue "$3"; fi
}

# Back into the queue, if the job is still running or at its time limit. A job that SLURM is ending for any other reason
# was cancelled by its owner, whom a requeue would thwart, or is being requeued by SLURM after a preemption or a failure.
# If the job's script was killed, as `requeue KILL` says, the job is ending because of that.
requeue() {
    local try answer
    for try in 1 2 3 4 5 6; do
        if answer=$(squeue --noheader --jobs="$job" --format='%T %r' 2>&1); then
            if [[ $answer != RUNNING* && $answer != *TimeLimit && "${1-} $answer" != KILL\ COMPLETING* ]]; then
                say "not requeued from here: SLURM is ending or requeuing this job itself (${answer:-gone})"
                return
            fi
            if answer=$(scontrol requeue "$job" 2>&1); then
                say "requeued"
                trap - TERM
                sleep 60 # SLURM ends this script; one that ends by itself may be taken for the end of the next start
                return
            fi
        fi
        say "attempt $try to requeue failed: $answer"
        sleep 10
    done
    say "NOT REQUEUED: submit the same command again to go on" >&2
}

# Pack shards with one MPI rank per task; in a job array, only this task's part of the shards and no index.
#   preprocess MODULE [option ...]
preprocess() {
    local module=$1 part=()
    shift
    if [[ ${SLURM_ARRAY_TASK_ID-} ]]; then
        # shellcheck disable=SC2153
        if ((SLURM_ARRAY_TASK_MIN != 0 || SLURM_ARRAY_TASK_MAX + 1 != SLURM_ARRAY_TASK_COUNT)); then
            fail "expected --array=0-N without gaps, found $SLURM_ARRAY_TASK_COUNT tasks from" \
                "$SLURM_ARRAY_TASK_MIN to $SLURM_ARRAY_TASK_MAX; a missing part is packed by the last job, without --array"
        fi
        part=(--part "$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT")
    fi
    prepare
    exec srun --export=ALL --mpi="$D2V2DS_MPI" --kill-on-bad-exit=1 "${D2V2DS_SRUN[@]}" "${D2V2DS_PREFIX[@]}" \
        python -m "$module" "$@" "${part[@]}" </dev/null
}

# Make a model of a run.
#   export_model RUN --to FOLDER [option ...]
export_model() {
    prepare
    exec srun --export=ALL --nodes=1 --ntasks=1 "${D2V2DS_SRUN[@]}" "${D2V2DS_PREFIX[@]}" \
        python -m d2v2ds.export "$@" </dev/null
}

# Evaluate a fine-tuned model.
#   evaluate_model MODEL --shards DIR [option ...] [--cells FILE]
# Cells with settings (section.field=value) are those of runs: the cell's run in the folder MODEL is evaluated. Cells of
# options are those of evaluations of one model, which go to a folder each in --to.
evaluate_model() {
    local words=() to=''
    while (($#)); do
        case $1 in
        --cells) read_cell "${2:?--cells needs a file}" && shift ;;
        --cells=*) read_cell "${1#*=}" ;;
        --to) to=${2:?--to needs a folder} && shift ;;
        --to=*) to=${1#*=} ;;
        *) words+=("$1") ;;
        esac
        shift
    done
    if [[ " ${cell[*]}" =~ ' '[a-z_.]+'.'[a-z_]+'=' ]]; then
        [[ ${words[0]--} != -* ]] || fail "expected the folder of the runs before all options, found ${words[0]-nothing}"
        words[0]+=/$cell_name
        cell=()
    elif [[ $cell_name && ! $to ]]; then
        fail "--cells with options: expected --to FOLDER, in which each cell gets a folder, found none"
    elif [[ ${SLURM_ARRAY_TASK_ID-} && ! $cell_name ]]; then
        fail "expected --cells FILE in a job array, found none: all tasks would do the same"
    fi
    prepare
    exec srun --export=ALL --nodes=1 --ntasks=1 "${D2V2DS_SRUN[@]}" "${D2V2DS_PREFIX[@]}" \
        python -m d2v2ds.evaluate "${words[@]}" "${cell[@]}" ${to:+--to "$to${cell_name:+/$cell_name}"} </dev/null
}
