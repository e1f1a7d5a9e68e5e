"""benchmarks/gpu.sh without a GPU: its arguments, its order, and that no step stops another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
STEPS = ["smoke", "pytest", "memcheck", "racecheck", "tune", "quick", "bench"]
BY_NAME = {"block": ["block"], "tiles": ["tiles"], "accuracy": ["train", "accuracy"]}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="for GPU machines with Linux")


def run(*arguments, **environment):
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=60)


def test_it_is_a_script_that_bash_can_read():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


def test_dry_run_prints_every_step_and_runs_nothing(tmp_path):
    done = run("--dry-run", "--wheels", tmp_path, OUT=str(tmp_path / "out"))
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [line[0] for line in lines] == ["install", "install", *STEPS]
    assert all(0 < int(line[3].removesuffix("s")) <= 580 for line in lines[2:])
    assert not (tmp_path / "out").exists()
    assert [line.split()[0] for line in run("--dry-run", "tune", "smoke").stdout.splitlines()] == [
        "install", "tune", "smoke",
    ]  # fmt: skip


def test_steps_that_run_only_by_name(tmp_path):
    lines = [line.split() for line in run("--dry-run", *BY_NAME, OUT=str(tmp_path)).stdout.splitlines()[1:]]
    assert [line[0] for line in lines] == [step for steps in BY_NAME.values() for step in steps]
    block, tiles, train, accuracy = (int(line[3].removesuffix("s")) for line in lines)
    assert all("cuda" in line for line in lines if line[0] != "tiles") and tiles < 580
    assert block + train < 0.9 * accuracy == 0.9 * 580


def test_they_find_the_files_beside_them(tmp_path):
    """PYTHONSAFEPATH, which the other steps need, would hide those."""
    python = fake_python(tmp_path, f'case "$1" in benchmarks/*) exec {sys.executable} "$1" --help ;; esac')
    run("--python", python, "--seconds", "300", *BY_NAME, OUT=str(tmp_path / "out"))
    ends = {line.split()[0]: line.split()[1] for line in (tmp_path / "out" / "summary.txt").read_text().splitlines()}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert [ends[step] for steps in BY_NAME.values() for step in steps] == ["ok"] * 4, log
    assert log.count("Usage: ") == 4


@pytest.mark.parametrize(
    "arguments", [["--wheels"], ["--wheels", "/no/such"], ["--seconds", "ten"], ["--python"], ["everything"]]
)
def test_what_it_does_not_know_is_refused(arguments):
    done = run("--dry-run", *arguments)
    assert done.returncode == 2 and done.stderr


def fake_python(folder, last):
    """Keeps its arguments; nothing can be installed, and the rest ends as `last` says."""
    file = folder / "python"
    file.write_text(f'#!/bin/sh\necho "$PYTHONPATH $@" >> {folder}/calls\n[ "$2" = pip ] && exit 1\n{last}\n')
    file.chmod(0o755)
    return file


def test_a_failing_step_stops_no_other(tmp_path):
    python = fake_python(tmp_path, "exit 3")
    done = run("--python", python, "smoke", "tune", "quick", "bench", OUT=str(tmp_path / "out"))
    summary = (tmp_path / "out" / "summary.txt").read_text()
    ends = [line.split()[:3] for line in summary.splitlines() if "there" not in line]
    assert ends == [[name, "exit", "3"] for name in ("smoke", "tune", "quick", "bench")] and done.returncode == 0
    assert "torchao    is not there" in summary and done.stdout.endswith(summary)
    calls = (tmp_path / "calls").read_text()
    for part in ("benchmarks/sanitize.py --quick", "tune --quick", "bench --quick --budget", f"--out {tmp_path}/out"):
        assert part in calls
    # what pip could not install was put together from links, and taken away again
    site = next(line.split()[0] for line in calls.splitlines() if "sanitize" in line)
    assert "hwpq_fx-site" in site and not Path(site.split(":")[0]).exists()


def test_a_step_is_stopped_at_the_end_of_the_time(tmp_path):
    python = fake_python(tmp_path, 'case "$*" in *sanitize*) exec sleep 60 ;; esac')
    done = run("--python", python, "--seconds", "24", "smoke", "quick", "tune", OUT=str(tmp_path / "out"))
    assert "smoke      stopped at its limit" in done.stdout and "tune       no time left" in done.stdout


def test_links_make_the_package(tmp_path):
    python = fake_python(tmp_path, f'case "$*" in *sanitize*) exec {sys.executable} -c "import hwpq_fx.kernels as k\n'
                         'import hwpq_fx.passes as p; print(k.__file__, p.__file__)";; esac')  # fmt: skip
    run("--python", python, "smoke", OUT=str(tmp_path / "out"))
    assert "ok" in (tmp_path / "out" / "summary.txt").read_text().splitlines()[-1]
    assert (tmp_path / "out" / "log.txt").read_text().count("hwpq_fx-site") >= 2
