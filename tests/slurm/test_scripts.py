"""The job scripts without a controller: the scheduler's variables are made up, its commands write down their arguments.

`scontrol show hostnames` is the real one, which needs no controller; where it is not installed, those tests skip.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2v2ds.config.load import load_config
from d2v2ds.run.decoder_choice import add_arguments
from d2v2ds.run.restart import FINISHED, SAVED, STOPS

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
TEMPLATES = [path for path in SCRIPTS if path.name not in ("launch.sh", "rank.sh")]
CONF = "ClusterName=none\nSlurmctldHost=localhost\nNodeName=n1\nPartitionName=p Nodes=ALL\n"
"""What `scontrol` wants to see before it looks at its arguments."""

FAKES = {
    # the last start's arguments and environment; then what the test wants a run to do
    "srun": """
printf '%s\\0' "$@" > "$NOTES/srun"
env -0 > "$NOTES/environment"
source "$NOTES/run"
""",
    "scontrol": """
if [[ $1 == show ]]; then exec "$SCONTROL" "$@"; fi
echo "$*" >> "$NOTES/scontrol"
exit "$(cat "$NOTES/scontrol.code")"
""",
    "squeue": 'cat "$NOTES/state"\n',
    "sleep": 'echo "$*" >> "$NOTES/sleep"\n',
}


class Batch:
    """A job script in an environment like that of a batch job."""

    def __init__(self, folder: Path) -> None:
        self.notes = folder / "notes"
        self.run_dir = folder / "the run"
        bins = folder / "bin"
        for path in (self.notes, bins, folder / "conf"):
            path.mkdir()
        for name, body in FAKES.items():
            (bins / name).write_text(f"#!/bin/bash\n{body}")
            (bins / name).chmod(0o755)
        (folder / "conf" / "slurm.conf").write_text(CONF)
        (folder / "site.env").write_text("D2V2DS_VENV=\n")
        kept = {name: v for name, v in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "D2V2DS_"))}
        self.environment = kept | {
            "PATH": f"{bins}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "NOTES": str(self.notes),
            "SCONTROL": shutil.which("scontrol") or "none",
            "SLURM_CONF": str(folder / "conf" / "slurm.conf"),
            "D2V2DS_SITE": str(folder / "site.env"),
            "D2V2DS_HOME": str(ROOT),
            "SLURM_JOB_ID": "20007",
            "SLURM_JOB_NODELIST": "n1",
            "SLURM_NTASKS": "2",
        }
        self.folder = folder
        self.plan()

    def plan(self, run: str = "exit 0", state: str = "RUNNING None", requeue_code: int = 0) -> None:
        """What `srun`, `squeue` and `scontrol requeue` do from now on."""
        (self.notes / "run").write_text(run)
        (self.notes / "state").write_text(f"{state}\n")
        (self.notes / "scontrol.code").write_text(f"{requeue_code}\n")

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(ROOT / "slurm" / script), *arguments], env=self.environment | variables, cwd=self.folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def submit(self, script: str, *arguments: str, **variables: str) -> tuple[int, str]:
        """Exit code, and what was said."""
        process = self.start(script, *arguments, **variables)
        said, _ = process.communicate(timeout=180)
        return process.returncode, said

    def pretrain(self, *arguments: str, **variables: str) -> tuple[int, str]:
        return self.submit("pretrain_audio.sh", f"run.dir={self.run_dir}", *arguments, **variables)

    def srun(self) -> list[str]:
        """Words that `srun` was given."""
        return (self.notes / "srun").read_text().split("\0")[:-1]

    def tasks_see(self, name: str) -> str | None:
        """A variable as `srun` passes it on."""
        pairs = (pair.partition("=") for pair in (self.notes / "environment").read_text().split("\0"))
        return next((value for key, _, value in pairs if key == name), None)

    def requeues(self) -> list[str]:
        file = self.notes / "scontrol"
        return file.read_text().splitlines() if file.exists() else []


@pytest.fixture
def batch(tmp_path: Path) -> Batch:
    if shutil.which("scontrol") is None:
        pytest.skip("scontrol is not installed: apt-get install slurm-wlm")
    return Batch(tmp_path)


# ------------------------------------------------------------------ as text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_shellcheck_finds_nothing() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck is not installed")
    command = [program, "-x", *(str(script.relative_to(ROOT)) for script in SCRIPTS)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_every_job_survives_its_nodes() -> None:
    for script in TEMPLATES:
        text = script.read_text()
        assert "#SBATCH --requeue\n" in text and "#SBATCH --open-mode=append\n" in text, script.name
        assert ("#SBATCH --signal=B:USR1@" in text) == script.name.startswith(("pretrain_", "finetune_", "sweep")), (
            script.name
        )


def test_example_of_site_values_changes_nothing_and_names_only_what_exists() -> None:
    example, launch = ((ROOT / "slurm" / name).read_text() for name in ("site.env.example", "launch.sh"))
    lines = [line for line in example.splitlines() if line and not line.startswith("#")]
    assert lines == [], "everything in it is a comment"
    offered = {line[1:].partition("=")[0] for line in example.splitlines() if line.startswith("#D2V2DS_")}
    assert offered and all(f"\n{name}=" in launch for name in offered)


# ------------------------------------------------------------------ rendezvous


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("gpu[3-5]", "gpu3"),
        ("gpu[007-009,012],big3", "gpu007"),
        ("x3,x1,x2", "x3"),
        ("r[2-3]n[4,6]", "r2n4"),
    ],
)
def test_first_node_leads_whatever_the_form_of_the_list(batch: Batch, nodes: str, first: str) -> None:
    code, said = batch.pretrain(SLURM_JOB_NODELIST=nodes)
    assert code == 0, said
    assert batch.tasks_see("MASTER_ADDR") == first
    assert batch.tasks_see("MASTER_PORT") == "10007"


def test_a_list_that_cannot_be_read_is_an_error(batch: Batch) -> None:
    code, said = batch.pretrain(SLURM_JOB_NODELIST="")
    assert code != 0
    assert "cannot expand the node list" in said
    assert not (batch.notes / "srun").exists()


@pytest.mark.parametrize("job", ["1", "19999", "20000", "4294901759"])
def test_ports_are_free_for_users_and_not_given_to_outgoing_connections(batch: Batch, job: str) -> None:
    batch.pretrain(SLURM_JOB_ID=job)
    assert batch.tasks_see("MASTER_PORT") == str(10000 + int(job) % 20000)
    assert 1024 < 10000 + int(job) % 20000 < 32768


def test_a_script_outside_of_a_job_says_so(batch: Batch) -> None:
    del batch.environment["SLURM_JOB_ID"]
    code, said = batch.pretrain()
    assert code != 0
    assert "submit this script with sbatch" in said


def test_tasks_and_gpus_must_be_as_many(batch: Batch) -> None:
    code, said = batch.pretrain(SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="1")
    assert code == 2
    assert "expected a task for each GPU, found --ntasks-per-node=1 and 8 GPUs on a node" in said
    assert batch.pretrain(SLURM_GPUS_ON_NODE="8", SLURM_NTASKS_PER_NODE="8")[0] == 0
    assert batch.pretrain(SLURM_NTASKS_PER_NODE="2")[0] == 0, "nodes without GPUs"


# ------------------------------------------------------------------ arguments

AWKWARD = [
    "a=two words", "b='single'", 'c="double"', "d=$HOME", "e=$(touch hacked)", "f=`touch hacked`", "g=*", "h=a\\b",
    "i=;touch hacked", "j=", "k=[[1,2],[3]]", "l=é\ttab\nline",
]  # fmt: skip


def test_arguments_arrive_as_they_are(batch: Batch) -> None:
    code, said = batch.pretrain(*AWKWARD)
    assert code == 0, said
    words = batch.srun()
    assert words[words.index("d2v2ds.pretrain") :] == [
        "d2v2ds.pretrain", "--config", "audio_large", f"data.shards={ROOT}/data/audio", *AWKWARD,
        f"run.dir={batch.run_dir}",
    ]  # fmt: skip
    assert not list(batch.folder.rglob("hacked"))


@pytest.mark.parametrize("script", ["preprocess_audio.sh", "preprocess_image.sh", "preprocess_text.sh", "export.sh"])
def test_arguments_of_other_jobs_arrive_as_they_are(batch: Batch, script: str) -> None:
    code, said = batch.submit(script, *AWKWARD)
    assert code == 0, said
    assert batch.srun()[-len(AWKWARD) :] == AWKWARD
    assert not list(batch.folder.rglob("hacked"))


def test_another_configuration_and_folder_take_the_place_of_the_defaults(batch: Batch) -> None:
    for arguments in (["--config", "audio_tiny"], ["--config=audio_tiny"]):
        batch.pretrain(*arguments)
        words = batch.srun()
        assert words[words.index("--config") + 1] == "audio_tiny"
        assert words.count("--config") == 1
        assert "audio_large" not in words
    (batch.folder / "site.env").write_text("D2V2DS_VENV=\nD2V2DS_RUNS=$NOTES/runs\n")
    batch.submit("pretrain_audio.sh", "--config", "audio_tiny")
    assert batch.srun()[-1] == f"run.dir={batch.notes}/runs/audio_tiny"


def test_site_values_reach_the_command(batch: Batch) -> None:
    (batch.folder / "site.env").write_text(
        "D2V2DS_VENV=\nD2V2DS_PREFIX=(env A='b c')\nD2V2DS_SRUN=(--network='x y')\nD2V2DS_MPI=pmix\nD2V2DS_DATA=/d\n"
        "D2V2DS_RAW='/r w'\n"
    )
    batch.pretrain()
    words = batch.srun()
    start = words.index("--network=x y")
    assert words[start + 1 : start + 4] == ["bash", str(ROOT / "slurm" / "rank.sh"), str(batch.run_dir)]
    assert words[start + 4 : start + 8] == ["env", "A=b c", "python", "-m"]
    assert "data.shards=/d/audio" in words
    batch.submit("preprocess_audio.sh")
    words = batch.srun()
    assert "--mpi=pmix" in words
    assert words[words.index("--input") :] == ["--input", "/r w/audio", "--output", "/d/audio"]


def test_a_task_of_an_array_packs_its_part(batch: Batch) -> None:
    array = {"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "9"}
    assert batch.submit("preprocess_audio.sh", **array, SLURM_ARRAY_TASK_COUNT="10")[0] == 0
    assert batch.srun()[-2:] == ["--part", "2/10"]
    code, said = batch.submit("preprocess_audio.sh", **array, SLURM_ARRAY_TASK_COUNT="4")
    assert code == 2
    assert "expected --array=0-N without gaps, found 4 tasks from 0 to 9" in said


# ------------------------------------------------------------------ sweeps

CELLS = (
    "# rates and seeds\n\nlr.peak=1e-5 run.seed=1\n  lr.peak=1e-5   run.seed=2\r\n\t\na=$(touch hacked) b=* c=x/../y"
)


@pytest.fixture
def sweep(batch: Batch) -> dict[str, str]:
    """Variables of the second task of an array; `cells.txt` has three cells."""
    (batch.folder / "cells.txt").write_text(CELLS)
    (batch.folder / "site.env").write_text("D2V2DS_VENV=\nD2V2DS_RUNS=$NOTES/runs\n")
    return {"SLURM_ARRAY_JOB_ID": "20004", "SLURM_ARRAY_TASK_ID": "1"}


def test_a_task_of_an_array_trains_its_cell_in_its_own_folder(batch: Batch, sweep: dict[str, str]) -> None:
    for words in (["--cells", "cells.txt"], ["--cells=cells.txt"]):
        code, said = batch.submit("finetune_text.sh", "lr.peak=1", *words, "d=1", **sweep)
        assert code == 0, said
        own = f"{batch.notes}/runs/finetune/glue_sst2/lr.peak=1e-5,run.seed=2"
        assert batch.srun()[-5:] == ["lr.peak=1", "d=1", "lr.peak=1e-5", "run.seed=2", f"run.dir={own}"]
        assert Path(own, "attempts.jsonl").is_file()
    code, said = batch.submit("finetune_text.sh", "run.dir=there", "--cells", "cells.txt", **sweep)
    assert code == 0 and batch.srun()[-1] == "run.dir=there/lr.peak=1e-5,run.seed=2"


def test_words_of_a_cell_are_not_evaluated_and_its_folder_stays_inside(batch: Batch, sweep: dict[str, str]) -> None:
    own = sweep | {"SLURM_ARRAY_TASK_ID": "2"}
    code, said = batch.submit("finetune_text.sh", "run.dir=there", "--cells", "cells.txt", **own)
    assert code == 0, said
    assert batch.srun()[-5:] == [
        "a=$(touch",
        "hacked)",
        "b=*",
        "c=x/../y",
        "run.dir=there/a=__touch,hacked_,b=_,c=x_.._y",
    ]
    assert not list(batch.folder.rglob("hacked"))


def test_a_task_goes_back_into_the_queue_without_its_array(batch: Batch, sweep: dict[str, str]) -> None:
    """The number of an array's last task is that of the array: `scontrol requeue` of it means every task."""
    batch.plan(run="exit 75")
    assert batch.submit("finetune_text.sh", "--cells", "cells.txt", **sweep, SLURM_JOB_ID="20004")[0] == 75
    assert batch.requeues() == ["requeue 20004_1"]


@pytest.mark.parametrize(
    ("cells", "task", "words", "said"),
    [
        ("a.b=1", "0", ["run.dir=r"], "expected --cells FILE in a job array, found none: all tasks would train in r"),
        ("a.b=1", "1", ["--cells", "c"], "expected tasks from 0 to 0, found task 1"),
        ("a.b=1", "", ["--cells", "c"], "expected a job array, found none"),
        ("a.b=1", "0", ["--cells", "other"], "--cells other: expected a file that can be read"),
        ("a.b=1\nc.d=2\na.b=1", "0", ["--cells", "c"], "cells 0 and 2 are alike"),
        ("a.b=/1\na.b=*1", "1", ["--cells", "c"], "cells 1 and 0 are alike"),
        ("a.b=" + "1" * 300, "0", ["--cells", "c"], "expected at most 200 letters in a cell, found 304"),
    ],
)
def test_arrays_without_a_cell_for_each_task_do_not_start(
    batch: Batch, cells: str, task: str, words: list[str], said: str
) -> None:
    (batch.folder / "c").write_text(f"{cells}\n")
    code, printed = batch.submit("finetune_audio.sh", *words, SLURM_ARRAY_JOB_ID="20004", SLURM_ARRAY_TASK_ID=task)
    assert code == 2 and said in printed, printed
    assert not (batch.notes / "srun").exists()


def test_an_array_evaluates_the_run_of_each_cell_or_each_setting(batch: Batch, sweep: dict[str, str]) -> None:
    code, said = batch.submit("evaluate.sh", "runs/a", "--shards", "d", "--cells", "cells.txt", **sweep)
    assert code == 0, said
    assert batch.srun()[-4:] == ["d2v2ds.evaluate", "runs/a/lr.peak=1e-5,run.seed=2", "--shards", "d"]
    (batch.folder / "weights.txt").write_text("--lm-weight=1 --word-score=-1\n--lm-weight=2 --word-score=0.5\n")
    weights = ["--lm", "a.arpa", "--cells", "weights.txt"]
    code, said = batch.submit("evaluate.sh", "runs/a", *weights, "--to=out", **sweep)
    assert code == 0, said
    words = batch.srun()
    assert words[words.index("runs/a") :] == [
        "runs/a", "--lm", "a.arpa", "--lm-weight=2", "--word-score=0.5", "--to", "out/lm-weight=2,word-score=0.5",
    ]  # fmt: skip
    for given, fault in (
        (["runs/a", *weights], "expected --to FOLDER, in which each cell gets a folder"),
        (["--shards", "d", "--cells", "cells.txt"], "expected the folder of the runs before all options"),
        (["runs/a"], "expected --cells FILE in a job array, found none"),
    ):
        code, said = batch.submit("evaluate.sh", *given, **sweep)
        assert code == 2 and fault in said


def test_evaluation_without_an_array_gets_its_words_as_they_are(batch: Batch) -> None:
    assert batch.submit("evaluate.sh", *AWKWARD, "--to", "a b")[0] == 0
    assert batch.srun()[-len(AWKWARD) - 2 :] == [*AWKWARD, "--to", "a b"]


@pytest.mark.parametrize("file", sorted((ROOT / "slurm" / "sweeps").glob("*.txt")), ids=lambda path: path.name)
def test_shipped_sweeps_have_the_cells_that_their_heads_say_and_every_command_takes_them(file: Path) -> None:
    lines = file.read_text().splitlines()
    cells = [line.split() for line in lines if line and not line.startswith("#")]
    head = " ".join(line for line in lines if line.startswith("#"))
    assert f"{len(cells)} cells." in head and f"--array=0-{len(cells) - 1} " in head
    assert len({tuple(cell) for cell in cells}) == len(cells)
    for cell in cells:
        if cell[0].startswith("--"):
            parser = argparse.ArgumentParser()
            add_arguments(parser)
            parser.parse_args(cell)
        else:
            load_config("finetune/glue_rte", [*cell, "data.shards=a", "run.dir=b"])


def test_a_task_of_an_array_runs_its_cell_of_a_sweep(batch: Batch) -> None:
    assert batch.submit("sweep.sh", *AWKWARD, SLURM_ARRAY_TASK_ID="2")[0] == 0
    words = batch.srun()
    assert words[words.index("d2v2ds.sweep") :] == ["d2v2ds.sweep", *AWKWARD, "--cell", "2"]
    assert batch.submit("sweep.sh", "num_masks", D2V2DS_SWEEP_CELL="7", SLURM_ARRAY_TASK_ID="2")[0] == 0
    assert batch.srun()[-3:] == ["num_masks", "--cell", "7"]
    code, said = batch.submit("sweep.sh", "num_masks")
    assert code == 2 and "expected a job array (--array=0-N), or D2V2DS_SWEEP_CELL" in said


@pytest.mark.parametrize(("code", "requeues"), [(75, ["requeue 20007_0"]), (9, []), (0, [])])
def test_a_cell_that_was_interrupted_is_requeued(batch: Batch, code: int, requeues: list[str]) -> None:
    batch.plan(run=f"exit {code}")
    assert batch.submit("sweep.sh", "num_masks", SLURM_ARRAY_TASK_ID="0")[0] == code
    assert batch.requeues() == requeues


# ------------------------------------------------------------------ ends


@pytest.mark.parametrize("code", [FINISHED, *STOPS])
def test_a_run_that_says_that_it_is_over_is_left_alone(batch: Batch, code: int) -> None:
    batch.plan(run=f"exit {code}")
    assert batch.pretrain()[0] == code
    assert batch.requeues() == []


@pytest.mark.parametrize("code", [SAVED, 1, 137, 143, 233])
def test_a_run_that_saved_or_crashed_goes_back_into_the_queue(batch: Batch, code: int) -> None:
    batch.plan(run=f"exit {code}")
    assert batch.pretrain()[0] == code
    assert batch.requeues() == ["requeue 20007"]
    noted = json.loads((batch.run_dir / "attempts.jsonl").read_text())
    assert (noted["job"], noted["restart"], noted["code"], noted["warned"]) == (20007, 0, code, "")


def test_third_crash_alike_stops_loudly(batch: Batch) -> None:
    batch.plan(run="exit 1")
    for restart in range(2):
        batch.pretrain(SLURM_RESTART_COUNT=str(restart))
    assert len(batch.requeues()) == 2
    code, said = batch.pretrain(SLURM_RESTART_COUNT="2")
    assert code == 1
    assert "stop: GIVING UP: 3 crashes in a row with code 1" in said
    assert len(batch.requeues()) == 2


@pytest.mark.parametrize("state", ["CANCELLED None", "COMPLETING None", "PENDING BeginTime", "PREEMPTED None", ""])
def test_a_job_that_slurm_is_ending_is_not_requeued_from_inside(batch: Batch, state: str) -> None:
    batch.plan(run="exit 75", state=state)
    code, said = batch.pretrain()
    assert code == 75
    assert batch.requeues() == []
    assert f"not requeued from here: SLURM is ending or requeuing this job itself ({state or 'gone'})" in said


def test_a_job_at_its_time_limit_is_requeued(batch: Batch) -> None:
    batch.plan(run="exit 75", state="COMPLETING TimeLimit")
    batch.pretrain()
    assert batch.requeues() == ["requeue 20007"]


def test_requeuing_is_tried_again_and_its_failure_is_said(batch: Batch) -> None:
    batch.plan(run="exit 75", requeue_code=1)
    code, said = batch.pretrain()
    assert code == 75
    assert batch.requeues() == ["requeue 20007"] * 6
    assert "NOT REQUEUED: submit the same command again to go on" in said


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_ranks_and_their_exit_code_counts(batch: Batch, number: signal.Signals) -> None:
    batch.plan(
        run="trap 'touch $NOTES/told; exit 75' USR1; touch $NOTES/up; for i in {1..600}; do read -t 0.1 <> <(:); done"
    )
    process = batch.start("pretrain_audio.sh", f"run.dir={batch.run_dir}")
    wait_for(batch.notes / "up")
    process.send_signal(number)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 75, said
    assert (batch.notes / "told").exists()
    assert f"got {number.name}; asking all ranks to save" in said
    assert batch.requeues() == ["requeue 20007"]
    assert json.loads((batch.run_dir / "attempts.jsonl").read_text())["warned"] == number.name[3:]


def test_ranks_that_do_not_end_cannot_keep_the_job_from_going_back(batch: Batch) -> None:
    """TERM is the last word before SLURM kills the script itself."""
    batch.plan(run="trap '' USR1 TERM; touch $NOTES/up; for i in {1..600}; do read -t 0.1 <> <(:); done")
    process = batch.start("pretrain_audio.sh", f"run.dir={batch.run_dir}")
    wait_for(batch.notes / "up")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 137, said
    assert "got SIGTERM, and ranks warned by SIGUSR1 have not ended; not waiting for them" in said
    assert batch.requeues() == ["requeue 20007"]


def test_a_job_warned_before_its_ranks_are_there_does_not_start_them(batch: Batch) -> None:
    (batch.folder / "site.env").write_text(
        "D2V2DS_VENV=\nD2V2DS_MODULES=(slow)\n"
        "module() { touch $NOTES/up; for i in {1..10}; do read -t 0.1 <> <(:) || true; done; }\n"
    )
    process = batch.start("pretrain_audio.sh", f"run.dir={batch.run_dir}")
    wait_for(batch.notes / "up")
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 75, said
    assert not (batch.notes / "srun").exists()
    assert batch.requeues() == ["requeue 20007"]


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
