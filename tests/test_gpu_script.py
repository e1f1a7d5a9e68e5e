"""benchmarks/gpu.sh without a GPU: its arguments, its order, and that no step stops another."""

import json
import os
import re
import subprocess
import sys
import tarfile
from itertools import chain
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
STEPS = ["smoke", "cuts", "tune", "quick", "generate", "pytest", "memcheck", "racecheck", "block", "bench"]
SCRIPTS = {"block": ["block"], "accuracy": ["train", "accuracy"]} | (
    {"cuts": ["cuts"]} if SCRIPT.with_name("cuts.py").exists() else {}
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="for GPU machines with Linux")


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("OUT", str(tmp_path / "out"))


def run(*arguments, before=()):
    command = [*before, "bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def summary(tmp_path):
    return (tmp_path / "out" / "summary.txt").read_text()


def test_it_is_a_script_that_bash_can_read():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True).returncode == 0
    assert os.access(SCRIPT, os.X_OK)


def test_dry_run_prints_every_step_and_runs_nothing(tmp_path):
    done = run("--dry-run", "--wheels", tmp_path)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [line[0] for line in lines] == ["install", "install", *STEPS]
    assert all(0 < int(line[3].removesuffix("s")) <= 580 for line in lines[2:])
    assert not (tmp_path / "out").exists()
    assert [line.split()[0] for line in run("--dry-run", "tune", "smoke").stdout.splitlines()] == [
        "install", "tune", "smoke",
    ]  # fmt: skip
    sanitizers = [" ".join(line) for line in lines if line[0] in ("memcheck", "racecheck")]
    assert all("--report-api-errors no" in line and line.endswith("sanitize.py --quick --own") for line in sanitizers)
    by_name = [line.split() for line in run("--dry-run", "accuracy").stdout.splitlines()[1:]]
    assert [line[0] for line in by_name] == ["train", "accuracy"] and by_name[0][3] < by_name[1][3] == "580s"


def test_the_calls_of_its_head_run_every_step_once_in_half_an_hour_and_fit_a_quarter(tmp_path):
    calls = re.findall(r"^#   benchmarks/gpu.sh (--wheels .*)", SCRIPT.read_text(), re.MULTILINE)
    (tmp_path / "results").mkdir()
    made = [
        run("--dry-run", *call.replace(".whl", str(tmp_path)).replace(".state", str(tmp_path)).split())
        for call in calls
    ]
    assert len(calls) == 5 and {done.returncode for done in made} == {0}
    steps = [[line.split()[0] for line in done.stdout.splitlines() if not line.startswith("install")] for done in made]
    assert [*chain(*steps[2:])] == STEPS
    assert [*chain(*steps[:2])] == ["smoke", "block", "tune", "quick", "generate"]
    seconds = [int(re.search(r"--seconds (\d+)", call)[1]) for call in calls[:2]]
    assert max(seconds) < 600 and sum(seconds) < 15 * 60 - 120  # a machine's start counts, and so do transfers


def test_they_find_the_files_beside_them(tmp_path):
    """PYTHONSAFEPATH, which the other steps need, would hide those."""
    python = fake_python(tmp_path, f'case "$1" in benchmarks/*) exec {sys.executable} "$1" --help ;; esac')
    run("--python", python, "--seconds", "300", *SCRIPTS)
    ends = {line.split()[0]: line.split()[1] for line in summary(tmp_path).splitlines()}
    log = (tmp_path / "out" / "log.txt").read_text()
    made = [step for steps in SCRIPTS.values() for step in steps]
    assert [ends[step] for step in made] == ["ok"] * len(made), log
    assert log.count("Usage: ") == len(made)


@pytest.mark.parametrize(
    "arguments",
    [["--wheels"], ["--wheels", "/no/such"], ["--state", "/tmp"], ["--seconds", "ten"], ["--python"], ["everything"]],
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


HAS_PACKAGES = 'case "$2" in "import hwpq_fx.bench.command, torchao") exit 0 ;; esac\n'


def test_a_failing_step_stops_no_other(tmp_path):
    done = run(
        "--python", fake_python(tmp_path, HAS_PACKAGES + "exit 3"), "smoke", "tune", "generate", "memcheck", "bench"
    )
    ends = [line.split()[:3] for line in summary(tmp_path).splitlines() if "compute" not in line]
    names = ("smoke", "tune", "generate", "bench")
    assert [end for end in ends if end[0] in names] == [[name, "exit", "3"] for name in names] and done.returncode == 1
    assert done.stdout.endswith(summary(tmp_path))
    calls = (tmp_path / "calls").read_text()
    for part in ("benchmarks/sanitize.py --quick", "tune --quick --no-peers", f"--out {tmp_path}/out",
                 "bench --only generate --model llama-3-8b --budget"):  # fmt: skip
        assert part in calls
    # what pip could not install was put together from links, and taken away again
    site = next(line.split()[0] for line in calls.splitlines() if "sanitize" in line)
    assert "hwpq_fx-site" in site and not Path(site.split(":")[0]).exists()


def test_without_its_packages_nothing_is_begun(tmp_path):
    looks = f'case "$2" in *find_spec*) exec {sys.executable} "$@" nosuchpackage ;; esac\n'
    done = run("--python", fake_python(tmp_path, looks + "echo it says why >&2; exit 1"), "smoke", "tune")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "not there: nosuchpackage; get wheels (pip download" in done.stderr and "--wheels" in done.stderr
    assert "sanitize" not in (tmp_path / "calls").read_text() and done.stderr == summary(tmp_path)
    done = run("--python", fake_python(tmp_path, "echo it says why >&2; exit 1"), "smoke")
    assert done.stderr == "hwpq_fx or torchao cannot be imported: it says why\n"


def test_a_step_is_stopped_at_the_end_of_the_time(tmp_path):
    python = fake_python(tmp_path, 'trap "echo was told" INT; case "$*" in *sanitize*) sleep 60 ;; esac')
    ignoring = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")  # as shells begin background work
    done = run("--python", python, "--seconds", "37", "smoke", "quick", "tune", before=ignoring)
    assert "smoke      stopped at its limit" in done.stdout and "tune       no time left" in done.stdout
    assert done.returncode == 1 and "was told" in (tmp_path / "out" / "log.txt").read_text()


@pytest.mark.parametrize("xdist", [True, False])
def test_tests_are_spread_where_that_can_be(tmp_path, xdist):
    refuses = "exit 0" if xdist else 'case "$2" in "import xdist") exit 1 ;; esac'
    assert run("--python", fake_python(tmp_path, refuses), "pytest").returncode == 0
    (command,) = [line for line in (tmp_path / "calls").read_text().splitlines() if "-m pytest" in line]
    assert ("-n 8 --dist worksteal" in command) == xdist and "tests/test_gpu.py" in command
    # of others not even the imports are paid for
    assert "tests/test_convert.py" not in command


def test_links_make_the_package(tmp_path):
    python = fake_python(tmp_path, f'case "$*" in *sanitize*) exec {sys.executable} -c "import hwpq_fx.kernels as k\n'
                         'import hwpq_fx.passes as p; print(k.__file__, p.__file__)";; esac')  # fmt: skip
    assert run("--python", python, "smoke").returncode == 0
    assert "ok" in summary(tmp_path).splitlines()[-1]
    assert (tmp_path / "out" / "log.txt").read_text().count("hwpq_fx-site") >= 2


def test_a_call_goes_on_from_what_another_left(tmp_path, monkeypatch):
    made = 'mkdir -p "$TRITON_CACHE_DIR/one" && echo compiled >> "$TRITON_CACHE_DIR/one/kernel" && '
    made += 'echo "{}" > "$XDG_CACHE_HOME/hwpq_fx/gpu.json" && '
    made += f'echo "{{}}" > {tmp_path}/out/results/gpu.json'
    done = run("--python", fake_python(tmp_path, f'case "$*" in *sanitize*) {made};; esac'), "smoke")
    assert done.returncode == 0
    (tmp_path / "out").rename(tmp_path / "state")
    with tarfile.open(tmp_path / "state" / "cache.tgz") as packed:
        assert packed.getnames()[-1] == "triton/one/kernel"
    (tmp_path / "state" / "results" / "gpu.json").chmod(0o444)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "another"))
    check = f'cat "$TRITON_CACHE_DIR/one/kernel" "$XDG_CACHE_HOME/hwpq_fx/gpu.json" {tmp_path}/out/results/gpu.json'
    python = fake_python(tmp_path, f'case "$*" in *sanitize*) {check};; esac')
    assert run("--python", python, "--state", tmp_path / "state", "smoke").returncode == 0
    assert json.loads((tmp_path / "out" / "table" / "gpu.json").read_text()) == {}
    assert os.stat(tmp_path / "out" / "results" / "gpu.json").st_mode & 0o200
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) <= 6


def test_compiled_code_that_is_too_large_stays_behind(tmp_path):
    made = 'head -c 17000000 /dev/urandom > "$TRITON_CACHE_DIR/kernel"'
    done = run("--python", fake_python(tmp_path, f'case "$*" in *sanitize*) {made};; esac'), "smoke")
    assert "left out" in done.stdout and not (tmp_path / "out" / "cache.tgz").exists() and done.returncode == 0
