"""Probes beside a run: when they begin, what ends them, and that none of it reaches the run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from d2v2ds.config.load import load_config
from d2v2ds.config.schema import ProbeSection
from d2v2ds.errors import ConfigError, PreemptedError
from d2v2ds.io import durable
from d2v2ds.run.probing import Probing

WRITE = """
import json, pathlib, sys
run, step = pathlib.Path(sys.argv[1]), int(sys.argv[3][4:])
kind = [word for word in sys.argv if word.startswith("--kind=")][0][7:]
(run / "probes.jsonl").open("a").write(json.dumps({"step": step, "kind": kind, "modality": "audio"}) + "\\n")
print("the model learned")
"""
"""A program that notes that it was asked."""
HANG = "import time; time.sleep(600)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
)


def probing(run_dir: Path, code: str, **settings: object) -> Probing:
    """Of a run of 8 steps, probed every 2."""
    given = {"modalities": {"audio": run_dir / "labelled"}, "every_steps": 2, "limit_minutes": 1.0} | settings
    return Probing(run_dir, ProbeSection(**given), 8, (sys.executable, "-c", code))  # type: ignore[arg-type]


def saved(one: Probing, run_dir: Path, step: int) -> None:
    one.saved(run_dir / "checkpoints" / f"step{step:08d}", step)


def steps(run_dir: Path) -> list[int]:
    file = run_dir / "probes.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def process_of(one: Probing) -> int:
    until(lambda: one._work is not None and one._work.process is not None)
    assert one._work is not None
    assert one._work.process is not None
    return one._work.process.pid


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_due_checkpoints_are_probed_and_the_end_waits_for_the_last(tmp_path: Path) -> None:
    with probing(tmp_path, WRITE, kinds=("one", "ctc")) as one:
        saved(one, tmp_path, 1)
        saved(one, tmp_path, 2)
        until(lambda: len(steps(tmp_path)) == 2)
        until(lambda: one._thread is None or not one._thread.is_alive())
        saved(one, tmp_path, 8)
    assert steps(tmp_path) == [2, 2, 8, 8]


def test_no_probe_without_a_folder(tmp_path: Path) -> None:
    with probing(tmp_path, WRITE, modalities={}) as one:
        saved(one, tmp_path, 8)
    assert steps(tmp_path) == []


def test_probe_that_still_runs_skips_the_next_with_one_line_and_the_last_follows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gate = tmp_path / "go"
    code = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.02)\n{WRITE}"
    with caplog.at_level("INFO", logger="d2v2ds"), probing(tmp_path, code) as one:
        for step in (2, 4, 8):
            saved(one, tmp_path, step)
        gate.touch()
    assert steps(tmp_path) == [2, 8]
    lines = [record.message for record in caplog.records]
    assert [line for line in lines if "not probed" in line] == ["step 4 is not probed: the probe of step 2 still runs"]
    assert lines[-1] == "step 8, probe of audio: the model learned"


def test_resumed_run_makes_up_for_what_is_missing_and_repeats_nothing(tmp_path: Path) -> None:
    with probing(tmp_path, WRITE) as one:
        saved(one, tmp_path, 8)
    with probing(tmp_path, WRITE, kinds=("one", "ctc")) as one:
        one.went_back(8)  # as a resume from step 8
        saved(one, tmp_path, 8)
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "probes.jsonl").read_text().splitlines()]
    assert kinds == ["one", "ctc"]


def test_rollback_ends_the_probe_and_drops_records_of_abandoned_steps(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "kind": "one", "modality": "audio"}) for step in (2, 4)]
    (tmp_path / "probes.jsonl").write_text("\n".join(lines) + "\n")
    with probing(tmp_path, HANG) as one:
        saved(one, tmp_path, 6)
        pid = process_of(one)
        one.went_back(2)
        assert not is_alive(pid)
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; print('oh'); sys.exit('no such label')", "failed with code 1: no such label; "),
        ("import os; os.kill(os.getpid(), 9)", "killed by signal 9 (Killed); the run continues"),
    ],
)
def test_failing_or_killed_probe_is_one_warning(
    code: str, message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with probing(tmp_path, code) as one:
        saved(one, tmp_path, 8)
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert message in record.message
    assert record.message.startswith("step 8, probe of audio: ")


def test_probe_whose_log_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with probing(tmp_path / "gone", WRITE) as one:
        saved(one, tmp_path / "gone", 8)
    (record,) = caplog.records
    assert "its process cannot be started" in record.message


def test_hanging_probe_ends_at_its_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d2v2ds.run.probing.GRACE_S", 0.3)
    with probing(tmp_path, STUBBORN, limit_minutes=0.02) as one:
        saved(one, tmp_path, 8)
        pid = process_of(one)
    assert not is_alive(pid), "SIGKILL follows SIGTERM"
    assert "step 8 is not probed for audio, kind one: ended after probe.limit_minutes 0.02; this command" in caplog.text


def test_error_of_the_run_ends_the_probe_at_once(tmp_path: Path) -> None:
    with pytest.raises(PreemptedError), probing(tmp_path, HANG) as one:
        saved(one, tmp_path, 8)
        pid = process_of(one)
        raise PreemptedError("stopped")
    assert not is_alive(pid)


def test_end_waits_once_for_its_limit_and_names_what_stays_unprobed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with probing(tmp_path, HANG, kinds=("one", "ctc")) as one:
        saved(one, tmp_path, 4)
        process_of(one)
        saved(one, tmp_path, 8)
        assert one.needed == {"step00000004", "step00000008"}
        one._settings = replace(one._settings, limit_minutes=0.01)
    said = [record.message for record in caplog.records if record.levelname == "WARNING"]
    wanted = [f"step {step} is not probed for audio, kind {kind}" for step in (4, 8) for kind in ("one", "ctc")]
    assert [line.partition(": ended after probe.limit_minutes 0.01; this command ")[0] for line in said] == wanted
    assert f"{tmp_path} --checkpoint step00000008 --shards={tmp_path / 'labelled'} --kind=ctc" in said[-1]
    assert said[-1].endswith(" --append")
    assert one.needed == {"step00000008"}


def test_limit_of_a_checkpoint_names_all_its_probes_that_are_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with probing(tmp_path, HANG, kinds=("one", "ctc"), limit_minutes=0.005) as one:
        saved(one, tmp_path, 2)
        until(lambda: not one._is_busy)
        assert one.needed == frozenset()
    said = [record.message for record in caplog.records]
    assert [line.partition(";")[0] for line in said] == [
        "step 2 is not probed for audio, kind one: ended after probe.limit_minutes 0.005",
        "step 2 is not probed for audio, kind ctc: ended after probe.limit_minutes 0.005",
    ]


def test_record_that_a_probe_appends_during_a_return_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process of the probe appends between the reading and the writing of the run, or waits for its end."""
    records = [{"step": step, "kind": "one", "modality": "audio"} for step in (2, 4)]
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    code = f"""
import sys
from pathlib import Path
from d2v2ds.run.probing import append_record
print("ready", flush=True)
sys.stdin.readline()
append_record(Path({str(tmp_path)!r}), {{"step": 2, "kind": "ctc", "modality": "audio"}})
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        right = durable.replace_text

        def late(path: Path, text: str) -> None:
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=1)
            right(path, text)

        monkeypatch.setattr(durable, "replace_text", late)
        probing(tmp_path, HANG).went_back(2)
        assert process.wait(timeout=60) == 0
    found = [json.loads(line) for line in (tmp_path / "probes.jsonl").read_text().splitlines()]
    assert [(record["step"], record["kind"]) for record in found] == [(2, "one"), (2, "ctc")]


def test_signal_ends_the_wait_for_the_last_probe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = time.monotonic()
    with probing(tmp_path, HANG) as one:
        saved(one, tmp_path, 8)
        pid = process_of(one)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # if it comes before the wait
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert not is_alive(pid)
    assert time.monotonic() - before < 50
    assert "step 8 is not probed for audio, kind one: ended by SIGUSR1; this command does it: " in caplog.text


def test_probe_yields_to_others_in_a_group_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), probing(tmp_path, HANG, threads=3) as one:
        saved(one, tmp_path, 8)
        pid = process_of(one)
        until(lambda: os.getpriority(os.PRIO_PROCESS, pid) == 19)
        assert os.getpgid(pid) == pid
        assert os.getsid(pid) == os.getsid(0), "a session of its own has its own share of the cores"
        variables = Path(f"/proc/{pid}/environ")
        until(lambda: variables.read_bytes() != b"")  # empty for a moment while the program is exchanged (execve)
        assert {b"OMP_NUM_THREADS=3", b"CUDA_VISIBLE_DEVICES="} <= set(variables.read_bytes().split(b"\0"))
        raise ConfigError("enough")


def test_command_ends_when_the_run_is_gone() -> None:
    """Its input is a pipe of the run, which ends with the run's process, even by SIGKILL."""
    code = "import time\nfrom d2v2ds.run.probe import end_with_input\nend_with_input()\nprint('ready', flush=True)\n"
    with subprocess.Popen(
        [sys.executable, "-c", f"{code}time.sleep(600)"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=60) == 1


# ------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["probe.every_steps=300", "probe.audio=x"], "probe.every_steps is 300, expected a multiple of run.save_every"),
        (["probe.every_steps=250"], "probe.every_steps is given and no folder of labelled rows"),
        (["probe.image=x"], "probe.image is given and data.image is not"),
        (["probe.test.audio=x"], "probe.test.audio is given and probe.audio"),
        (["probe.audio=x", "probe.block=9"], "probe.block is 9, the network of audio has blocks 1 to 4"),
        (["probe.audio=x", "probe.kinds=[one, one]"], "expected different kinds, one or more"),
        (["probe.audio=x", "probe.kinds=[two]"], "probe.kinds"),
        (["probe.audio=x", "probe.threads=0"], "probe.threads"),
    ],
)
def test_impossible_probes_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("audio_tiny", ["data.shards=x", *overrides])
    assert message in str(caught.value)


def test_settings_survive_the_runs_file(tmp_path: Path) -> None:
    from d2v2ds.config.load import to_yaml

    given = [
        "data.shards=x",
        "probe.audio=~/a",
        "probe.test.audio=b",
        "probe.every_steps=250",
        "probe.kinds=[one, ctc]",
    ]
    config = load_config("audio_tiny", given)
    assert config.probe.modalities == {"audio": Path.home() / "a"}
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml")) == config
