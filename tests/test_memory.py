"""What memory there is, by what the system and the container say."""

from pathlib import Path

import pytest
import torch

from hwpq_fx import memory

MEMINFO = "MemTotal:  100 kB\nMemFree:  10 kB\nMemAvailable:  60 kB\n"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({"/proc/meminfo": MEMINFO}, 60 * 1024),
        ({"/proc/meminfo": MEMINFO, "memory.max": "max\n", "memory.current": "5\n"}, 60 * 1024),
        ({"/proc/meminfo": MEMINFO, "memory.max": "5000\n", "memory.current": "2000\n"}, 3000),
        ({"/proc/meminfo": MEMINFO, "memory.max": "5000\n", "memory.current": "6000\n"}, 0),
        ({"/proc/meminfo": "nothing known\n"}, memory.UNTOLD),
        ({}, memory.UNTOLD),
    ],
)
def test_what_is_free_on_the_host(files, free, monkeypatch):
    def read(path):
        name = str(path) if str(path) in files else path.name
        if name not in files:
            raise FileNotFoundError(path)
        return files[name]

    monkeypatch.setattr(Path, "read_text", read)
    assert memory.room(torch.device("cpu")) == free // 2
    assert memory.room(torch.device("cpu"), taken=1000) == (free + 1000) // 2


def test_what_this_machine_says():
    assert 2**28 < memory.room(torch.device("cpu")) < 2**45
