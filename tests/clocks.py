"""A clock for tests: runs calls on the CPU and says they took what the test says; a call to time; a bench's lines."""

import torch

from hwpq_fx.bench import run as bench_run
from hwpq_fx.bench.shapes import MERGED


class FakeRegion:
    def __init__(self, calls, length, took):
        self.work = [calls[at % len(calls)] for at in range(length)]
        self.calls, self.note, self.took, self.runs = length, "", took, 0
        self.run()

    def run(self):
        self.runs += 1
        first = self.work[0]()
        self.first = first if isinstance(first, tuple) else (first,)
        for call in self.work[1:]:
            call()

    def sample(self, seconds):
        return list(self.took)


class FakeClock:
    """`took`: seconds of one call in each run; `lost`: what `check_alive` raises."""

    def __init__(self, took=(1e-6, 2e-6, 3e-6, 4e-6, 5e-6), l2_bytes=1, lost=None):
        self.device, self.l2_bytes, self.took, self.lost = torch.device("cpu"), l2_bytes, took, lost
        self.regions = []

    def region(self, calls, length):
        self.regions.append(FakeRegion(calls, length, self.took))
        return self.regions[-1]

    def check_alive(self):
        if self.lost:
            raise self.lost


def fill(out, value, elements=None):
    out.view(-1)[:elements] = value
    return out


def is_one(outputs):
    return "" if bool((outputs[0] == 1).all()) else "not one"


MACHINE = {
    "device": "NVIDIA H100 80GB HBM3", "arch": 90, "multiprocessors": 132, "l2_bytes": 50 << 20,
    "memory_bytes": 80 << 30, "driver": "1", "cuda": "13.0", "python": "3.12", "torch": "2", "triton": "3",
    "torchao": "0", "transformers": "5", "hwpq_fx": "0", "commit": "abc", "sources": "def", "date": "2000-01-01",
}  # fmt: skip

TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}  # fmt: skip

LAYER = {MERGED: [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)]}


def line(n, k, m, contender, us, status="ok", **more):
    return {"n": n, "k": k, "m": m, "contender": contender, "status": status, "median_us": us, "error": "", **more}


def layer_lines(us, m=1, shapes=LAYER[MERGED]):
    return [line(n, k, m, name, value) for n, k in shapes for name, value in us.items()]


def result_of(lines=(), prune=(), generate=(), **more):
    ceilings = {"copy_bytes_per_s": 3e12, "bf16_flops": 8e14, "node_us": 1.25}
    return bench_run.fresh(MACHINE) | {"linears": list(lines), "prune": list(prune), "generate": list(generate),
                                       "ceilings": ceilings, "stopped": "", "failures": [], "complete": True,
                                       "models": ["llama-3-8b"], **more}  # fmt: skip


def generated(variant, ms, skips=0, work="decode", status="ok"):
    return {"work": work, "batch": 1, "variant": variant, "status": status, "ms_per_token": ms,
            "forward_ms": ms / 2 - 1, "cudagraph_skips": skips}  # fmt: skip
