"""The job scripts on a real controller with two nodes: the whole chain, arrays, and jobs that must stop."""

import json
import os
import shlex
import signal
from pathlib import Path

import pytest

from d2v2ds.distributed.checkpoint.format import named_tag
from d2v2ds.interop.export_folder import ModelFolder
from tests.preprocessing.helpers import contents
from tests.runs.launching import deterministic, records
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import STEPS, TWO_NODES, assert_same_run, attempts, fine_tune, pretrain, with_transcripts

pytestmark = pytest.mark.run
ROOT = Path(__file__).parents[2]


def test_every_script_can_be_placed_unmodified(cluster: Cluster) -> None:
    for script in sorted((ROOT / "slurm").glob("*.sh")):
        if script.name not in ("launch.sh", "rank.sh"):
            placed = cluster.attempt("sbatch", "--test-only", str(script.relative_to(ROOT)))
            assert placed.returncode == 0, f"{script.name}: {placed.stderr}"
            assert "to start at" in placed.stderr


def test_packed_pretrained_warned_requeued_finished_and_exported(
    cluster: Cluster, shards: Path, unbroken: Path
) -> None:
    """The chain of README: each job waits for the one before; the second one is warned while it runs."""
    packed, run_dir, model = (cluster.jobs / name for name in ("packed", "run", "model"))
    source = ["--input", str(shards.parent / "manifest.tsv"), "--output", str(packed), "--shard-bytes", "128K"]
    prepare = cluster.submit(*TWO_NODES, "slurm/preprocess_audio.sh", *source)
    train = pretrain(cluster, packed, run_dir, f"--dependency=afterok:{prepare}")
    export = cluster.submit(f"--dependency=afterok:{train}", "slurm/export.sh", str(run_dir), "--to", str(model))
    tuned, labelled = cluster.jobs / "tuned", with_transcripts(shards.parent, cluster.jobs)
    tune = fine_tune(cluster, labelled, model, tuned, f"--dependency=afterok:{export}")
    words = [str(tuned), "--shards", str(labelled), "--draws", "20"]
    score = cluster.submit(f"--dependency=afterok:{tune}", "slurm/evaluate.sh", *words)

    assert cluster.finished(prepare)["JobState"] == "COMPLETED", cluster.output(prepare)
    assert cluster.job(prepare)["NodeList"] == "a[1-2]"
    cluster.until(lambda: records(run_dir) >= 3)
    at_signal = records(run_dir)
    cluster.client("scancel", "--batch", "--signal=USR1", str(train))
    cluster.until(lambda: cluster.job(train)["Restarts"] == "1")
    stopped_at = records(run_dir)
    assert at_signal <= stopped_at < STEPS
    assert named_tag(run_dir / "checkpoints", "latest") == f"step{stopped_at:08d}", "nothing is lost"
    assert not model.exists(), "what waits for a requeued job goes on waiting"

    job = cluster.finished(train)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), cluster.story()
    ends = [(one["job"], one["restart"], one["code"], one["warned"]) for one in attempts(run_dir)]
    assert ends == [(train, 0, 75, "USR1"), (train, 1, 0, "")]
    assert_same_run(run_dir, unbroken)
    assert deterministic(run_dir)[-1]["step"] == STEPS
    logs = sorted(path.name for path in (run_dir / "logs").iterdir())
    assert logs == [f"job{train}.restart0.log", f"job{train}.restart1.log"]
    said = (run_dir / "logs" / logs[1]).read_text()
    assert f"resumed at step {stopped_at}" in said
    assert "stop: the run is finished" in cluster.output(train), "the file is not written anew by a restart"

    assert cluster.finished(export)["JobState"] == "COMPLETED", cluster.output(export)
    assert ModelFolder(model).description.origin["step"] == STEPS

    assert cluster.finished(tune)["JobState"] == "COMPLETED", cluster.story()
    assert f"weights of {model}" in next((tuned / "logs").iterdir()).read_text()
    assert [(one["job"], one["code"]) for one in attempts(tuned)] == [(tune, 0)]
    assert cluster.finished(score)["JobState"] == "COMPLETED", cluster.output(score)
    found = json.loads((tuned / "evaluation" / "evaluation.json").read_text())
    assert found["rows"] == 40 and found["greedy"]["wer"]["wanted"] == 60


def test_array_packs_in_parts_and_the_job_after_it_writes_the_index(cluster: Cluster, shards: Path) -> None:
    source = ["--input", str(shards.parent / "manifest.tsv"), "--shard-bytes", "128K"]
    one, four = cluster.jobs / "one", cluster.jobs / "four"
    whole = cluster.submit(*TWO_NODES, "slurm/preprocess_audio.sh", *source, "--output", str(one))
    script = ("slurm/preprocess_audio.sh", *source, "--output", str(four))
    array = cluster.submit("--ntasks-per-node=2", "--array=0-3", *script)
    last = cluster.submit("--ntasks-per-node=1", f"--dependency=afterok:{array}", *script)
    for job in (whole, last):
        assert cluster.finished(job)["JobState"] == "COMPLETED", cluster.story()
    said = "".join(path.read_text(errors="replace") for path in cluster.jobs.glob("preprocess_audio-*.out"))
    assert all(f"{four}: part {part}/4 is packed; no index yet" in said for part in range(4))
    assert "packing: 0 of 0 files" in cluster.output(last), "all parts were there"
    assert contents(four) == contents(one)


def site(cluster: Cluster, name: str, body: str) -> dict[str, str]:
    """Site values with which ranks run `bash -c BODY` instead, and those that hang are not waited for long."""
    file = cluster.folder / f"{name}.env"
    body = f'if [[ "$*" != *d2v2ds.pretrain* ]]; then exec "$@"; fi; {body}'
    file.write_text(
        f"{cluster.site.read_text()}\nD2V2DS_SRUN=(--wait=5)\nD2V2DS_PREFIX=(bash -c {shlex.quote(body)} bash)\n"
    )
    return {"D2V2DS_SITE": str(file)}


def test_what_srun_makes_of_ranks_that_do_not_end_together(cluster: Cluster) -> None:
    """One rank may leave well before another without its being killed; one that hangs alone is ended."""
    bodies = {
        "one after the other": "sleep $((2 * SLURM_PROCID)); exit 75",
        "one hangs": "if [[ $SLURM_PROCID == 1 ]]; then kill -KILL $$; fi; sleep 500",
        "one hangs and is deaf": "if [[ $SLURM_PROCID == 1 ]]; then exit 1; fi; trap true TERM INT USR1; "
        "for i in {1..500}; do sleep 1; done",
    }
    jobs = {}
    for number, (name, body) in enumerate(bodies.items()):
        run_dir = f"run.dir={cluster.jobs / name}"
        where = site(cluster, f"ends{number}", body)
        jobs[name] = cluster.submit(*TWO_NODES, "--gpus-per-node=1", "slurm/pretrain_audio.sh", run_dir, **where)
    for name, number in jobs.items():
        cluster.until(lambda number=number: cluster.job(number)["Restarts"] == "1")  # type: ignore[misc]
        cluster.client("scancel", str(number))
        (end, *_) = attempts(cluster.jobs / name)
        assert (end["code"] == 75) == (name == "one after the other"), (name, end)
        assert end["code"] in (75, 137), (name, end)


def test_a_cell_of_a_sweep_goes_back_into_the_queue_alone(cluster: Cluster) -> None:
    """The last task has the number of the whole array, and a requeue of that number would start every cell anew."""
    (cluster.jobs / "cells.txt").write_text("run.seed=0\nrun.seed=1\n")
    body = "if [[ $SLURM_ARRAY_TASK_ID == 1 && $SLURM_RESTART_COUNT != 1 ]]; then sleep 2; exit 75; fi; exit 0"
    words = [f"run.dir={cluster.jobs / 'sweep'}", "--cells", str(cluster.jobs / "cells.txt")]
    options = ("--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=1", "--array=0-1")
    cluster.submit(*options, "slurm/pretrain_audio.sh", *words, **site(cluster, "sweep", body))
    cells = [cluster.jobs / "sweep" / f"run.seed={number}" for number in range(2)]
    cluster.until(lambda: (cells[1] / "attempts.jsonl").exists() and len(attempts(cells[1])) == 2, timeout_s=200)
    assert [(one["restart"], one["code"]) for one in attempts(cells[1])] == [(0, 75), (1, 0)], cluster.story()
    cluster.until(lambda: not cluster.client("squeue", "--noheader"))
    assert [(one["restart"], one["code"]) for one in attempts(cells[0])] == [(0, 0)], cluster.story()


def test_job_that_fails_alike_three_times_stops(cluster: Cluster) -> None:
    run_dir = cluster.jobs / "fails"
    where = site(cluster, "fails", "exit 9")
    job = cluster.submit(*TWO_NODES, "--gpus-per-node=1", "slurm/pretrain_audio.sh", f"run.dir={run_dir}", **where)
    ended = cluster.finished(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "9:0", "2")
    assert [(one["restart"], one["code"]) for one in attempts(run_dir)] == [(0, 9), (1, 9), (2, 9)]
    assert "stop: GIVING UP: 3 crashes in a row with code 9" in cluster.output(job)


def test_job_whose_script_alone_is_killed_goes_back_into_the_queue(cluster: Cluster) -> None:
    """SLURM ends such a job. The ranks save, and the first of them notes the attempt and requeues."""
    run_dir, pid = cluster.jobs / "orphaned", cluster.jobs / "script"
    body = (
        f'if [[ $SLURM_RESTART_COUNT == 1 ]]; then exit 0; fi; trap "sleep 0.5; exit 75" TERM USR1; '
        f'echo "$D2V2DS_SCRIPT" > {pid}.$SLURM_PROCID; for i in {{1..300}}; do sleep 0.1; done'
    )
    where = site(cluster, "orphaned", body)
    job = cluster.submit(*TWO_NODES, "--gpus-per-node=1", "slurm/pretrain_audio.sh", f"run.dir={run_dir}", **where)
    cluster.until(lambda: len(list(cluster.jobs.glob("script.*"))) == 2)
    os.kill(int(pid.with_name("script.0").read_text().split()[1]), signal.SIGKILL)
    ended = cluster.finished(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), cluster.story()
    ends = [(one["restart"], one["code"], one["warned"]) for one in attempts(run_dir)]
    assert ends == [(0, 75, "KILL"), (1, 0, "")]
    said = (run_dir / "logs" / f"job{job}.restart0.log").read_text()
    assert "the job's script was killed; rank 0 ended with 75 and notes it" in said and "requeued" in said


def test_cancelled_job_saves_and_stays_away(cluster: Cluster) -> None:
    """`scancel JOB` is its owner's last word, though the ranks save and end as if they were only warned."""
    run_dir = cluster.jobs / "cancelled"
    where = site(cluster, "cancelled", f"trap 'exit 75' TERM USR1; touch {cluster.jobs}/up.$SLURM_PROCID; "
                 "for i in {1..300}; do sleep 0.1; done")  # fmt: skip
    job = cluster.submit(*TWO_NODES, "--gpus-per-node=1", "slurm/pretrain_audio.sh", f"run.dir={run_dir}", **where)
    cluster.until(lambda: len(list(cluster.jobs.glob("up.*"))) == 2)
    cluster.client("scancel", str(job))
    cluster.until(lambda: (run_dir / "attempts.jsonl").exists())
    ended = cluster.finished(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), cluster.output(job)
    assert attempts(run_dir)[0]["code"] in (75, 128 + signal.SIGTERM)
    assert "not requeued from here" in cluster.output(job)
