"""What follows from a bench's lines: sums over the linears of a layer, targets, and the table in README."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hwpq_fx.kernels.gpus import GPUS, Gpu
from hwpq_fx.kernels.roofline import floor, packed_bytes, steps

from .linears import ROWS
from .shapes import FORMS, MERGED, decoder

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
NOT_MEASURED = "Not yet measured: no file in `benchmarks/results` holds a GPU's figures."
DENSE_FP8 = ("fp8 dynamic", "fp8 weight-only")
FP8_PARTS = ("quantize alone", "scaled_mm alone")  # added up, one more dense FP8
OURS = "hwpq"
BEST_FP8 = "best dense fp8"

# the roofline model's op for each contender; a path by its name unless it stands here
OPS = {
    "bf16": "bf16",
    "fp8 dynamic": "fp8_dynamic",
    "fp8 weight-only": "fp8_weight_only",
    "torchao 2:4": "sparse_fp8",
    "torchao int4": "int4_weight_only",
    "cusparselt": "sparse_fp8",
    "cutlass": "sparse_fp8",
    "scaled_mm": "fp8_dynamic",
    "quantize": "quantize_rows",
    "gemv": "gemv",
    "tiles": "tiles",
    "tiles_fp8": "tiles_fp8",
}

Line = Mapping[str, Any]


def gpu_named(device: str) -> Gpu | None:
    """The datasheet of a GPU by the name that its driver gives, if we have it."""
    return next((gpu for key, gpu in GPUS.items() if key.upper() in device.upper()), None)


def floor_us(line: Line, gpu: Gpu | None) -> float | None:
    """The roofline model's floor under a line of linears, in microseconds; None without a datasheet or a model."""
    name, _, alone = line["contender"].removesuffix(" again").partition(" alone")
    name = line.get("path", "") if name == OURS else name
    if gpu is None or (op := OPS.get(name)) is None:
        return None
    size = (line["m"], line["n"], line["k"])
    least = steps(op, *size, gpu)["product"] if alone is not None and _is_alone(line) else floor(op, *size, gpu)
    return 1e6 * least.seconds


def _is_alone(line: Line) -> bool:
    return line["contender"].endswith(" alone") and not line["contender"].startswith("quantize")


class Sum(NamedTuple):
    """Microseconds of the linears of one decoder layer, one after the other."""

    model: str
    form: str
    m: int
    contender: str
    us: float


def cells(lines: Iterable[Line]) -> dict[tuple[int, int, int], dict[str, float]]:
    """Microseconds of everything that was right, and of the best dense FP8, for each (n, k, m)."""
    made: dict[tuple[int, int, int], dict[str, float]] = {}
    for one in lines:
        if one["status"] == "ok":
            made.setdefault((one["n"], one["k"], one["m"]), {})[one["contender"]] = one["median_us"]
    for cell in made.values():
        dense = [cell[name] for name in DENSE_FP8 if name in cell]
        if all(name in cell for name in FP8_PARTS):
            dense.append(sum(cell[name] for name in FP8_PARTS))
        if dense:
            cell[BEST_FP8] = min(dense)
    return made


def sums(lines: Iterable[Line], models: Iterable[str]) -> list[Sum]:
    """Of every contender that was right at every linear of the layer; and of the best dense FP8 of each linear."""
    times = cells(lines)
    rows = sorted({m for _, _, m in times})
    names = list(dict.fromkeys(name for cell in times.values() for name in cell))
    made = []
    for model in models:
        for form in FORMS:
            shapes = [linear.shape for linear in decoder(model).form(form)]
            for m in rows:
                for name in names:
                    every = [times.get((*shape, m), {}).get(name) for shape in shapes]
                    if None not in every:
                        made.append(Sum(model, form, m, name, sum(every)))  # type: ignore[arg-type]
    return made


class Target(NamedTuple):
    """A promise and what became of it. `measured` None: not measured."""

    what: str
    target: float
    floor: float
    measured: float | None
    least: bool = True
    """Larger is better; else smaller."""
    note: str = ""
    """What is to be known beside it."""

    @property
    def verdict(self) -> str:
        """ "met", "accepted" (short of the target, not under the floor), "missed" or "not measured"."""
        if self.measured is None:
            return "not measured"
        reached = [self.measured >= aim if self.least else self.measured <= aim for aim in (self.target, self.floor)]
        return "met" if reached[0] else "accepted" if reached[1] else "missed"

    @property
    def said(self) -> str:
        """The verdict and the note."""
        return f"{self.verdict} ({self.note})" if self.note else self.verdict

    def to_dict(self) -> dict[str, Any]:
        return {**self._asdict(), "verdict": self.verdict}


def targets(result: Mapping[str, Any], model: str = "llama-3-8b", form: str = MERGED) -> list[Target]:
    """The issue's table for one model's decoder layer, from a bench's result."""
    us = {(one.m, one.contender): one.us for one in sums(result["linears"], [model]) if one.form == form}

    def over(peer: str, m: int) -> float | None:
        return _ratio(us.get((m, peer)), us.get((m, OURS)))

    bandwidth = None
    if (1, OURS) in us and result["ceilings"]:
        moved = sum(packed_bytes(*one.shape) + 2 * (one.n + one.k) for one in decoder(model).form(form))
        bandwidth = moved / (1e-6 * us[1, OURS]) / result["ceilings"]["copy_bytes_per_s"]
    table = [
        Target("M = 1, share of the measured copy bandwidth", 0.85, 0.65, bandwidth),
        Target("M = 1, times the best dense FP8", 1.45, 1.15, over(BEST_FP8, 1)),
        Target("M = 1, times bf16", 2.8, 2.0, over("bf16", 1)),
        Target("M = 64, times dense FP8", 1.55, 1.2, over(BEST_FP8, 64)),
        Target("M = 512, times dense FP8", 1.4, 1.15, over(BEST_FP8, 512)),
        Target("M = 4096, times dense FP8", 1.75, 1.4, over(BEST_FP8, 4096)),
        Target("M = 16384, times dense FP8", 1.75, 1.4, over(BEST_FP8, 16384)),
        Target("M = 4096, times bf16", 3.3, 2.6, over("bf16", 4096)),
        Target(
            "any shape and M, times the best dense FP8 (the worst)", 1.0, 0.95, worst_ratio(result["linears"], model)
        ),
    ]
    prune = {one["contender"]: one.get("median_us") for one in result["prune"]}
    peers = [us for name, us in prune.items() if name.startswith("wanda") and us]
    ours = prune.get("prune_pack24")
    table += [
        Target("prune_pack24, times the time to copy the same bytes", 3, 8, _ratio(ours, prune.get("copy")), False),
        Target(
            "prune_pack24, times vectorised Wanda + quantize + compress", 10, 10, _ratio(min(peers, default=None), ours)
        ),
    ]
    return [
        *table,
        _generate_target("compiled bf16", 2.2, 1.6, ("bf16",), result["generate"]),
        _generate_target("compiled dense FP8", 1.25, 1.1, DENSE_FP8, result["generate"]),
    ]


def _generate_target(what: str, target: float, floor: float, peers: tuple[str, ...], lines: Iterable[Line]) -> Target:
    """End to end, by the fastest of the peers. Noted: the ratio of forwards alone, peers that were not measured, and
    who ran without CUDA graphs."""
    made = {
        one["variant"]: one
        for one in lines
        if (one["work"], one["batch"], one["status"]) == ("decode", 1, "ok") and one["variant"] in (*peers, OURS)
    }
    there = [name for name in peers if name in made]
    ratios: dict[str, float | None] = {
        time: _ratio(min((made[name][time] for name in there), default=None), made.get(OURS, {}).get(time))
        for time in ("ms_per_token", "forward_ms")
    }
    notes = []
    if ratios["forward_ms"]:
        notes.append(f"{ratios['forward_ms']:.2f} of the model's calls alone")
        notes += [f"without {name}" for name in peers if name not in made]
    notes += [f"{name} skipped CUDA graphs" for name, one in made.items() if one["cudagraph_skips"]]
    return Target(f"generate, batch 1, times {what}", target, floor, ratios["ms_per_token"], note="; ".join(notes))


def worst_ratio(lines: Iterable[Line], model: str) -> float | None:
    """The best dense FP8's time over ours where that is least; None unless both were right at every linear of the
    model, in either form, and every number of rows."""
    times = cells(lines)
    wanted = [times.get((*shape, m), {}) for shape in decoder(model).shapes() for m in ROWS]
    if not all(OURS in cell and BEST_FP8 in cell for cell in wanted):
        return None
    return min(cell[BEST_FP8] / cell[OURS] for cell in wanted)


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over and under else None


def markdown(results: Iterable[Mapping[str, Any]]) -> str:
    """The part of README that bench writes, of every GPU's result."""
    parts = [_of_one_gpu(result) for result in results]
    return "\n\n".join(parts) if parts else NOT_MEASURED


def ceilings_in_words(ceilings: Mapping[str, float]) -> str:
    """Of a result that has them."""
    return (
        f"Measured ceilings: {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s copied, "
        f"{ceilings['bf16_flops'] / 1e12:.0f} TFLOP/s bf16; a kernel of nothing in a graph takes "
        f"{ceilings['node_us']:.1f} us."
    )


def _of_one_gpu(result: Mapping[str, Any]) -> str:
    machine, ceilings = result["machine"], result["ceilings"]
    lines = [
        f"**{machine['device']}**, driver {machine['driver']}, torch {machine['torch']}, triton {machine['triton']}, "
        f"{machine['date']}" + ("" if result["complete"] else " (cut short)") + ".",
    ]
    if ceilings:
        lines.append(ceilings_in_words(ceilings))
    lines += ["", "| LLaMA-3-8B, q/k/v and gate/up merged | target | floor | measured | |", "|---|---|---|---|---|"]
    for one in targets(result):
        measured = "" if one.measured is None else f"{one.measured:.2f}"
        lines.append(f"| {one.what} | {one.target:g} | {one.floor:g} | {measured} | {one.said} |")
    lines += _sums_table(result)
    wrong = [one for one in result["linears"] if one["status"] in ("wrong", "failed")]
    if wrong:
        names = sorted({f"{one['contender']} ({one['status']})" for one in wrong})
        lines += ["", f"No speed is given for {len(wrong)} of {len(result['linears'])} lines: {', '.join(names)}."]
    return "\n".join(lines)


def _sums_table(result: Mapping[str, Any]) -> list[str]:
    wanted = ("bf16", *DENSE_FP8, "torchao 2:4", "torchao int4", OURS)
    lines = []
    for model in result["models"]:
        made = [one for one in sums(result["linears"], [model]) if one.form == MERGED]
        by = {(one.m, one.contender): one.us for one in made}
        rows = sorted({one.m for one in made})
        if not rows:
            continue
        lines += [
            "",
            f"Microseconds of the linears of a decoder layer, {model}, cold L2:",
            "",
            "| M | " + " | ".join(wanted) + " |",
            "|---" * (len(wanted) + 1) + "|",
            *(
                f"| {m} | " + " | ".join(f"{by[m, name]:.1f}" if (m, name) in by else "" for name in wanted) + " |"
                for m in rows
            ),
        ]
    return lines


def write_readme(file: Path, results: Iterable[Mapping[str, Any]]) -> None:
    """Put `markdown(results)` between the markers. Raises ValueError where the file has not one pair of them."""
    with file.open(newline="", encoding="utf-8") as opened:
        text = opened.read()
    line_end = "\r\n" if "\r\n" in text else "\n"
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end or START in rest or END in after:
        raise ValueError(f"{file} needs one {START} and one {END} after it")
    table = f"{START}\n{markdown(results)}\n{END}".replace("\n", line_end)
    with file.open("w", newline="", encoding="utf-8") as opened:
        opened.write(f"{before}{table}{after}")
