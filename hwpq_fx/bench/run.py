"""A run of `bench`: what is measured in which order, and the JSON it becomes, step by step."""

import gc
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hwpq_fx.kernels.table import table_of

from .contenders import COMPILING, STATIC_ROWS, contenders
from .linears import QUICK_ROWS, ROWS, linears
from .measure import Clock, GpuLost, copy_bandwidth, matrix_rate, node_us, one_line
from .models import generation, layers
from .prune import pruning
from .report import OURS, floor_us, gpu_named, sums, targets
from .shapes import FORMS, MERGED, decoder

FORMAT = 1
TOLD = ("bf16", "fp8 dynamic", "fp8 weight-only", "hwpq")
GROUPS = ("linears", "prune", "layers", "generate")
# in order of what is wanted most
PLAN = (("linears", "llama-3-8b"), ("prune", "llama-3-8b"), ("generate", "llama-3-8b"), ("layers", "llama-3-8b"),
        ("linears", "qwen2.5-7b"), ("linears", "llama-3.2-1b"), ("layers", "qwen2.5-7b"))  # fmt: skip
QUICK_PLAN = (("linears", "llama-3-8b"), ("prune", "llama-3-8b"))


class Effort(NamedTuple):
    """How long and how much."""

    budget: float
    """Seconds after which nothing new is begun."""
    sample: float
    """Seconds of samples of each line."""
    rows: Sequence[int]
    forms: Sequence[str]
    copy_bytes: int
    matrix: int


FULL = Effort(3600.0, 0.04, ROWS, FORMS, 4 * 2**30, 8192)
QUICK = Effort(420.0, 0.02, QUICK_ROWS, (MERGED,), 2 * 2**30, 8192)

Result = dict[str, Any]
Line = dict[str, Any]

# what tells one line of a group from another
KEYS = ("n", "k", "m", "contender", "variant", "batch", "length", "work", "prompt")


def key_of(line: Line) -> tuple:
    """What was measured. A linear is the same in whichever model; all else belongs to one."""
    return ("" if "n" in line else line["model"], *(line.get(name) for name in KEYS))


class Bench:
    """A run of the plan, whose result is on disk after every step. What an earlier run has in `file` is not measured
    again unless `again`."""

    def __init__(
        self,
        clock: Clock,
        machine: dict[str, Any],
        effort: Effort,
        file: Path,
        say: Callable[[str], None],
        again: bool = False,
    ):
        self.clock, self.effort, self.file, self.say = clock, effort, file, say
        self.started = time.monotonic()
        self.gpu = gpu_named(machine["device"])
        table = described_table(machine["device"])
        self.result = fresh(machine) | earlier(file, machine, table)
        # what need not be measured: nothing is learned from a time twice, nor from a reason
        self.known = set() if again else {
            (group, key_of(one)) for group in GROUPS for one in self.result[group]
            if one["status"] not in ("failed", "wrong")
        }  # fmt: skip
        self.result |= {
            "machine": machine,
            "settings": {"seconds": effort.sample, "table": table},
            "contenders": {one.name: one.what for one in contenders()},
            "complete": False,
            "stopped": "",
            "failures": [],
        }

    def run(self, plan: Iterable[tuple[str, str]]) -> Result:
        """Measure, in the order of the plan, until the budget is spent. Raises GpuLost; what there is by then is on
        disk."""
        self._write()
        try:
            with torch.no_grad(), torch._dynamo.config.patch(COMPILING):
                self.result["ceilings"] = {
                    "copy_bytes_per_s": copy_bandwidth(self.clock, self.effort.copy_bytes),
                    "bf16_flops": matrix_rate(self.clock, self.effort.matrix),
                    "node_us": node_us(self.clock),
                }
                for group, model in plan:
                    if not self._group(group, model):
                        return self.result
            self.result["complete"] = not self.result["failures"]
        except GpuLost as error:
            self.result["stopped"] = f"the GPU was lost: {error}"
            raise
        finally:
            self._write()
        return self.result

    def _group(self, group: str, model: str) -> bool:
        """One step of the plan; False where the budget is spent."""
        try:
            for lines in getattr(self, f"_{group}")(model):
                self._keep(group, lines)
                self._write()
                if time.monotonic() - self.started > self.effort.budget:
                    spent = f"the budget of {self.effort.budget:.0f} s was spent"
                    self.result["stopped"] = f"{spent} in {group}, {model}"
                    return False
        except GpuLost:
            raise
        except Exception as error:  # one group's trouble is not another's
            self.clock.check_alive()
            self.result["failures"].append(f"{group}, {model}: {one_line(error)}")
        finally:
            # compiled code holds the weights of the group
            torch._dynamo.reset()
            gc.collect()
        return True

    def _keep(self, group: str, lines: list[Line]) -> None:
        """Add lines in the place of those that measured the same."""
        new = [key_of(one) for one in lines]
        self.result[group] = [one for one in self.result[group] if key_of(one) not in new] + lines
        if group == "linears" and lines[0]["model"] not in self.result["models"]:
            self.result["models"].append(lines[0]["model"])

    def _knows(self, group: str, model: str) -> Callable[[Line], bool]:
        return lambda line: (group, key_of({"model": model, **line})) in self.known

    def _linears(self, model: str) -> Iterable[list[Line]]:
        shapes, known = decoder(model).shapes(self.effort.forms), self._knows("linears", model)
        for lines in linears(self.clock, shapes, self.effort.rows, contenders(), self.effort.sample, known):
            what = f"{model}  M = {lines[0]['m']}  {lines[0]['n']} x {lines[0]['k']}"
            told = [one for one in lines if one["contender"] in TOLD] or lines
            self.say(f"{what}  " + " | ".join(_short(one) for one in told))
            yield [{"model": model, **one, "floor_us": floor_us(one, self.gpu)} for one in lines]

    def _prune(self, model: str) -> Iterable[list[Line]]:
        lines = pruning(self.clock, decoder(model), self.effort.sample, self._knows("prune", model))
        return self._told(model, lines)

    def _layers(self, model: str) -> Iterable[list[Line]]:
        return self._told(model, layers(self.clock, model, self.effort.sample, self._knows("layers", model)))

    def _generate(self, model: str) -> Iterable[list[Line]]:
        return self._told(model, generation(self.clock.device, model, self._knows("generate", model)))

    def _told(self, model: str, lines: Iterable[Line]) -> Iterable[list[Line]]:
        for one in lines:
            self.say("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                               for name, value in one.items() if value != ""))  # fmt: skip
            yield [one | {"model": model}]

    def _write(self) -> Result:
        result = self.result
        result["seconds"] = round(time.monotonic() - self.started, 1)
        result["sums"] = [one._asdict() for one in sums(result["linears"], result["models"])]
        result["targets"] = {form: [one.to_dict() for one in targets(result, form=form)] for form in FORMS}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.file.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(self.file)
        return result


def fresh(machine: dict[str, Any]) -> Result:
    """A result with nothing in it."""
    return {
        "format": FORMAT,
        "what": "microseconds of a call, medians and quintiles, each from a cold L2 and replayed from a CUDA graph "
        "unless not_replayed says why; a line without status ok has no time. Of linears, ours are compiled for their "
        f"very number of rows up to {STATIC_ROWS}, torchao's for one row and for any number; the path tiles by itself "
        "puts x in its order by a kernel of its own, which in a model is part of what wrote x",
        "machine": machine,
        "settings": {},
        "contenders": {},
        "ceilings": {},
        "models": [],
        **{group: [] for group in GROUPS},
    }


SAME = ("device", "driver", "torch", "triton", "torchao", "sources")


def earlier(file: Path, machine: dict[str, Any], table: str) -> Result:
    """What an earlier run of the same code on the same kind of GPU has measured, to be added to; of ours only what went
    by the same table."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
        if found["format"] != FORMAT or any(found["machine"][name] != machine[name] for name in SAME):
            return {}
        stale = "" if found["settings"]["table"] == table else OURS
        return {"models": found["models"]} | {
            group: [one for one in found[group] if stale not in (one.get("contender"), one.get("variant"))]
            for group in GROUPS
        }
    except (ValueError, KeyError, TypeError):
        return {}


def described_table(device: str) -> str:
    """The table that our products go by: "default", or "measured" and a hash of what it holds."""
    table = table_of(device)
    digest = hashlib.sha256(repr(sorted(table.entries.items())).encode()).hexdigest()[:12]
    return f"{table.source} {digest}" if table.entries else table.source


def _short(line: dict[str, Any]) -> str:
    end = f"{line['median_us']:.1f} us" if line["status"] == "ok" else f"{line['status']}: {line['error']}"
    return f"{line['contender']} {end}"


def results_in(folder: Path) -> list[Result]:
    """Every GPU's result in a folder, by name. Raises ValueError for a file that holds no JSON."""
    made = []
    for file in sorted(folder.glob("*.json")):
        try:
            made.append(json.loads(file.read_text()))
        except ValueError as error:
            raise ValueError(f"{file} holds no JSON: {error}") from error
    return [one for one in made if isinstance(one, dict) and "machine" in one and "ceilings" in one]
