"""How much memory there is to use, where the user names no bound."""

from contextlib import suppress
from pathlib import Path

import torch

UNTOLD = 8 * 2**30


def room(device: torch.device, taken: int = 0) -> int:
    """Bytes on a device to use, `taken` of them already: half of what is free, 4 GiB where nothing tells."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_on_host()
    return (free + taken) // 2


def _free_on_host() -> int:
    """What the system has to give (Linux) or, where less, what the container may still take (cgroup v2)."""
    found = []
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        most, now = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(max(0, most - now))
    return min(found, default=UNTOLD)
