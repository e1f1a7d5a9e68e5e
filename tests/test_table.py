import json
import logging

import pytest

from hwpq_fx.kernels import cusparselt24, table
from hwpq_fx.kernels.cusparselt24 import export_algorithms
from hwpq_fx.kernels.table import DEFAULT, Table, load_table, save_table, table_of, user_table_file

DEVICE = "NVIDIA H100 80GB HBM3"
MEASURED = Table(
    {
        (4096, 4096): {1: {"gemv": 4.0, "tiles": 6.0}, 64: {"tiles": 7.5, "gemv": 40.0, "cutlass": 9.0}},
        (1024, 4096): {1: {"tiles": 2.0, "gemv": 3.0}},
    },
    {"key": [3, 1, -1]},
)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "user_cache_path", lambda name: tmp_path / name)
    monkeypatch.setattr(cusparselt24, "_found", {})
    table_of.cache_clear()
    yield tmp_path / "hwpq_fx"
    table_of.cache_clear()


def test_ranking_takes_the_next_larger_rows_and_the_nearest_shape():
    assert MEASURED.ranking(1, 4096, 4096) == ("gemv", "tiles")
    assert MEASURED.ranking(2, 4096, 4096) == ("tiles", "cutlass", "gemv")
    assert MEASURED.ranking(10_000, 4096, 4096) == ("tiles", "cutlass", "gemv")
    assert MEASURED.ranking(1, 1000, 3500) == ("tiles", "gemv")
    assert MEASURED.ranking(1, 14336, 4096) == ("gemv", "tiles")


def test_default_ranking_names_every_path_at_every_size():
    from hwpq_fx.kernels.paths import PATHS

    for rows in (0, 1, 8, 9, 64, 65, 10**6):
        assert sorted(DEFAULT.ranking(rows, 4096, 4096)) == sorted(PATHS)
    assert DEFAULT.ranking(1, 64, 64)[0] == "gemv"
    assert DEFAULT.ranking(10**6, 64, 64)[0] == "cusparselt"


def test_saved_table_is_used_by_its_own_gpu():
    assert table_of(DEVICE) is DEFAULT
    file = save_table(MEASURED, DEVICE)
    assert file == user_table_file(DEVICE)
    assert file.name == "nvidia-h100-80gb-hbm3.json"
    found = table_of(DEVICE)
    assert export_algorithms()["key"] == (3, 1, -1)
    assert (found.entries, found.algorithms) == (MEASURED.entries, MEASURED.algorithms)
    assert table_of("NVIDIA L40S") is DEFAULT
    assert [one.name for one in file.parent.iterdir()] == [file.name]


WRONG = {
    "another GPU": (lambda c: c | {"device": "NVIDIA L40S"}, "was made for device NVIDIA L40S"),
    "another torch": (lambda c: c | {"torch": "1.0"}, "was made for torch 1.0"),
    "another triton": (lambda c: c | {"triton": "0.1"}, "was made for triton 0.1"),
    "a newer format": (lambda c: c | {"format": 2}, "was made for format 2"),
    "no entries": (lambda c: c | {"entries": []}, "holds no times"),
    "no times": (lambda c: c | {"entries": [{"n": 8, "k": 8, "us": {}}]}, "holds no times"),
    "no paths": (lambda c: c | {"entries": [{"n": 8, "k": 8, "us": {"1": {}}}]}, "holds no times"),
    "a negative shape": (lambda c: c | {"entries": [{"n": -8, "k": 8, "us": {"1": {"gemv": 1}}}]}, "holds no times"),
    "a field missing": (lambda c: {k: v for k, v in c.items() if k != "entries"}, "is broken"),
    "times that are words": (lambda c: c | {"entries": [{"n": 8, "k": 8, "us": {"1": {"gemv": "x"}}}]}, "is broken"),
    "an algorithm of words": (lambda c: c | {"algorithms": {"key": "fast"}}, "is not alg_id"),
    "a list": (lambda c: [c], "is broken"),
}


@pytest.mark.parametrize("case", WRONG)
def test_table_that_does_not_fit_is_left_aside(case, caplog):
    change, message = WRONG[case]
    file = save_table(MEASURED, DEVICE)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=message):
        load_table(file, DEVICE)
    with caplog.at_level(logging.WARNING, "hwpq_fx"):
        assert table_of(DEVICE) is DEFAULT
        assert table_of(DEVICE) is DEFAULT
    assert len(caplog.records) == 1  # said once
    assert message in caplog.text and "hwpq-fx tune" in caplog.text
    save_table(MEASURED, DEVICE)  # and made anew
    assert table_of(DEVICE).entries == MEASURED.entries


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"null"])
def test_broken_file(content):
    file = save_table(MEASURED, DEVICE)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is broken"):
        load_table(file, DEVICE)
    assert table_of(DEVICE) is DEFAULT
