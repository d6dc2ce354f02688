"""The step benchmark runs at tiny size, with torch and numpy alone."""

import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = ("deepspeed", "pyarrow", "pydantic", "yaml", "tensorboard", "safetensors", "soundfile", "matplotlib", "tqdm")


@pytest.mark.run
@pytest.mark.parametrize(
    "size, dtypes, paths",
    [("tiny", "fp32,bf16", "auto,explicit"), ("image_tiny", "bf16", "auto"), ("text_tiny", "bf16", "auto")],
)
def test_step_benchmark_needs_only_torch_and_numpy(size: str, dtypes: str, paths: str) -> None:
    script = Path(__file__).with_name("step.py")
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({BLOCKED!r})); "
        f"sys.argv = ['step.py', '--config', {size!r}, '--seconds', '1', '--batch', '4', '--repeats', '1', "
        f"'--dtypes', {dtypes!r}, '--paths', {paths!r}]; "
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[dtype, path] for dtype in dtypes.split(",") for path in paths.split(",")]
    assert all(float(row[3]) > 0 and float(row[5]) > 0 for row in rows)
