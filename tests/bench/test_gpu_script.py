"""bench/gpu.sh where there is no GPU: its dry run, stopped at any moment, keeps what was finished."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STEPS = ["ceilings", "smoke", "verify_bf16", "verify_int8", "verify_fp32", "generation"]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a script for Linux")


def start(folder: Path, *steps: str) -> subprocess.Popen:
    (folder / "out").mkdir()
    own = {"PYTHON": sys.executable, "PYSPEC_RESULTS": str(folder / "gpu"), "OUT": str(folder / "out")}
    command = ["bash", ROOT / "bench/gpu.sh", *steps]
    log = open(folder / "log", "w")
    environment = {**os.environ, **own, "PYSPEC_DRY": "1"}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)


def packed(folder: Path) -> dict[str, str]:
    """The files in the archive, which is whole."""
    with tarfile.open(folder / "out/results.tgz") as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        return {Path(member.name).name: archive.extractfile(member).read().decode() for member in members}


def check(folder: Path) -> list[str]:
    """Every step that the log says has ended is in the archive, its JSON readable; their names."""
    ended = [line.split()[1].rstrip(":") for line in (folder / "log").read_text().splitlines() if ": status" in line]
    if not ended:
        return []
    files = packed(folder)
    kept = {row["step"] for row in map(json.loads, files["steps.jsonl"].splitlines())}
    assert set(ended) <= kept and {f"{name}.log" for name in ended} <= files.keys()
    for name, text in files.items():
        if name.endswith(".json"):
            json.loads(text)
    return ended


@pytest.mark.slow
def test_every_step_ends_well(tmp_path):
    process = start(tmp_path, *STEPS, "kernels")
    assert process.wait(timeout=500) == 0, (tmp_path / "log").read_text()
    assert check(tmp_path) == [*STEPS, "kernels"]
    files = packed(tmp_path)
    assert all(row["ok"] for op in json.loads(files["smoke.json"]).values() for row in op.values())
    bits = json.loads(files["verify_cuda.json"])["bits"]
    assert len(bits) == 3 and not any(row["different"] for sizes in bits.values() for row in sizes.values())
    models = json.loads(files["generation_cuda.json"])["models"]
    assert all(row["equal_to_plain"] == row["texts"] for rows in models.values() for row in rows.values())
    assert len(json.loads(files["kernels_cuda.json"])["rows"]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_stopped_at_any_moment(seed, tmp_path):
    process = start(tmp_path, *STEPS)
    time.sleep(random.Random(seed).uniform(0.5, 30))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    check(tmp_path)


def test_the_limits_of_all_steps_are_the_time_there_is():
    """Nine minutes."""
    script = (ROOT / "bench/gpu.sh").read_text()
    names = " ".join(re.findall(r'^ALL="(?:\$ALL )?(.*)"$', script, re.M)).split()
    limits = dict(re.findall(r"\bstep ([a-z_0-9]+) (\d+) ", script))
    assert sorted(names) == sorted(limits) and sum(map(int, limits.values())) <= 540


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_runs_without_a_gpu(tmp_path):
    command = ["bash", ROOT / "bench/gpu.sh"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYSPEC_RESULTS": str(tmp_path), "OUT": str(tmp_path)}
    environment.pop("PYSPEC_DRY", None)
    found = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert found.returncode == 1 and "no GPU" in found.stderr and "==" not in found.stdout
