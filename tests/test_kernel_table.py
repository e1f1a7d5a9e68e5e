"""`hwpq-fx kernels`, as a user runs it."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from hwpq_fx import kernel_table
from hwpq_fx.kernel_table import kernels, loads
from hwpq_fx.kernels.roofline import ROWS
from hwpq_fx.kernels.survey import Finding

WELL = Finding("hwpq_fx.kernels.some_triton", "some", "m = 1", 90, "", 40, 0, 16, 2048, 4, 12, sass="LDG.E.128 R1")
WELL = WELL._replace(instructions={"LDG.128": 4, "LDGSTS.16": 2, "LDS.32": 3, "HGMMA": 8, "PRMT": 7}, loop={"PRMT": 33})
SPILLS = WELL._replace(specimen="m = 64", registers=255, spills=48, stack=32)


def run(*arguments, **env):
    return CliRunner().invoke(kernels, arguments, env={"COLUMNS": "150", **env})


@pytest.fixture
def found(monkeypatch):
    findings = [WELL]

    def survey(archs, modules, name):
        assert modules == kernel_table.kernel_modules() and len(modules) > 0
        return (one._replace(arch=arch) for arch in archs for one in findings if name in ("", one.specimen))

    monkeypatch.setattr(kernel_table, "survey", survey)
    return findings


def test_table(found):
    shown = run("--arch", "90")
    assert shown.exit_code == 0, shown.output
    row = next(line for line in shown.stdout.splitlines() if "m = 1" in line)
    assert " ".join(row.split()) == "some m = 1 40 0 2048 4 12 128x4 16x2 3 0 7 HGMMA 8 33"
    assert "sm_90: a multiprocessor holds 64 warps; 227 KiB" in shown.stdout and "1 of 1 passed" in shown.stdout


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (SPILLS, "48 bytes spilled"),
        (WELL._replace(programs=0), "no program fits"),
        (Finding("m", "some", "m = 64", 90, "CompilationError: no [e4m3]"), "CompilationError: no [e4m3]"),
    ],
)
def test_exit_code_tells_of_one_bad_kernel(found, bad, why):
    found.append(bad)
    shown = run("--arch", "90")
    assert shown.exit_code == 1 and why in shown.stdout and "1 of 2 passed" in shown.stdout
    assert run("--arch", "90", "--json").exit_code == 1


def test_archs_repeat_and_all(found):
    archs = [one["arch"] for one in json.loads(run("--arch", "100", "--arch", "80", "--arch", "80", "--json").stdout)]
    assert archs == [80, 100]
    assert [one["arch"] for one in json.loads(run("--arch", "all", "--json").stdout)] == [80, 89, 90, 100, 120]


def test_json_and_sass(found):
    found.append(SPILLS)
    first, second = json.loads(run("--arch", "90", "--json").stdout)
    assert first["passed"] and not second["passed"] and second["spills"] == 48 and first["shared_limit"] == 227 * 1024
    assert "sass" not in first
    (only,) = json.loads(run("--arch", "90", "--json", "--sass", "m = 1").stdout)
    assert only["sass"] == WELL.sass
    assert run("--arch", "90", "--sass", "m = 1").stdout == "// some, m = 1, sm_90\nLDG.E.128 R1\n"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--arch", "75"),
        ("--arch", "90", "--roofline", "h100"),
        ("--roofline", "h100", "--sass", "m = 1"),
        ("--arch", "90", "--model", "llama-3-8b"),
        ("--roofline", "a100"),
        ("--arch", "90", "--sass", "nobody"),
    ],
)
def test_usage_errors(found, arguments):
    assert run(*arguments).exit_code == 2


def test_without_triton(monkeypatch):
    def survey(*_):
        raise RuntimeError("compiling kernels failed:\nModuleNotFoundError: No module named 'triton'")

    monkeypatch.setattr(kernel_table, "survey", survey)
    shown = run("--arch", "90")
    assert shown.exit_code == 2 and "pip install triton" in shown.output


@pytest.mark.skipif(sys.platform != "linux", reason="Triton's wheels are for Linux")
def test_for_real(monkeypatch):
    monkeypatch.setattr(kernel_table, "kernel_modules", lambda: ["sample_triton"])
    shown = run("--arch", "90", "--sass", "well", PYTHONPATH=str(Path(__file__).parent), TRITON_INTERPRET="1")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.startswith("// normalize, well, sm_90") and "LDG.E.128" in shown.stdout


def test_loads():
    assert loads({"LDG.32": 1, "LDG.128": 2, "LDGSTS.128": 3, "LDS.64": 9}) == "128x5 32x1"
    assert loads({"UTMALDG": 2, "LDG.32": 1}) == "TMAx2 32x1"


def test_roofline_table():
    shown = run("--roofline", "h100", "--model", "llama-3-8b")
    assert shown.exit_code == 0, shown.output
    assert "a model from datasheet figures, not a measurement" in shown.stdout
    rows = [line.split() for line in shown.stdout.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(ROWS)
    # 218 M weights of 2 bytes at 3.35 TB/s; 5 bits instead of 16, or of 8
    assert rows[0][1] == "130m" and rows[0][-2:] == ["3.19x", "1.60x"]
    assert all(cell[-1] == "t" for cell in (rows[-1][1], rows[-1][2], rows[-1][-3]))


def test_roofline_json():
    everything = json.loads(run("--roofline", "b200", "--json").stdout)
    assert everything["note"] == kernel_table.MODEL_NOTE and everything["gpu"]["arch"] == 100
    assert set(everything["models"]) == {"llama-3-8b", "qwen2.5-7b", "llama-3.2-1b"}
    first = everything["models"]["qwen2.5-7b"][0]
    assert first["m"] == 1 and first["vs_dense_fp8"] == pytest.approx(
        min(first["floors"][op]["seconds"] for op in kernel_table.DENSE_FP8) / first["ours"]["seconds"], rel=1e-3
    )
