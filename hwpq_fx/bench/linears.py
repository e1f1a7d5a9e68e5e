"""Linears measured one by one: every contender, every shape of a model, every number of rows."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from .contenders import DENSE, DENSE_FP8, DTYPE, OURS, Built, Contender, Unserved
from .measure import Clock, measured, normal, one_line, rotation

# in order of what is wanted most: a run that is cut short has the first
ROWS = (1, 64, 4096, 512, 16384, 16, 8, 256, 1024, 32, 4, 2, 128)
QUICK_ROWS = (1, 64, 4096, 512, 16384, 16)
NEEDED = (DENSE, DENSE_FP8, OURS)  # what targets are about: at every number of rows before all else

Line = dict[str, Any]


class Shape:
    """One weight [N, K] and the contenders built for it, once."""

    def __init__(self, clock: Clock, shape: tuple[int, int], contenders: Sequence[Contender]):
        self.clock, self.shape = clock, shape
        self.weight = normal(shape, DTYPE, clock.device) / shape[1] ** 0.5
        self.contenders = contenders
        self.built: dict[str, Built | Line] = {}

    def lines(self, rows: int, seconds: float, contenders: Sequence[Contender]) -> list[Line]:
        """These contenders at so many rows, on one random x."""
        x = normal((rows, self.shape[1]), DTYPE, self.clock.device)
        return [self._line(contender, x, seconds) for contender in contenders]

    def _line(self, contender: Contender, x: torch.Tensor, seconds: float) -> Line:
        n, k = self.shape
        line: Line = {"n": n, "k": k, "m": len(x), "contender": contender.name}
        if len(x) > contender.most_rows:
            return line | {"status": "skipped", "error": f"made for at most {contender.most_rows} rows"}
        built = self._built(contender)
        if not isinstance(built, Built):
            return line | built
        line |= {"path": built.picked(x)} if contender.kind == OURS else {}
        return line | measure_built(self.clock, built, x, n, contender.static_rows, seconds)

    def _built(self, contender: Contender) -> Built | Line:
        if contender.name not in self.built:
            try:
                self.built[contender.name] = contender.build(self.weight)
            except Unserved as why:
                self.built[contender.name] = {"status": "unserved", "error": str(why)}
            except Exception as error:  # whatever a contender raises is its result
                self.clock.check_alive()
                self.built[contender.name] = {"status": "failed", "error": one_line(error)}
        return self.built[contender.name]


def measure_built(clock: Clock, built: Built, x: torch.Tensor, n: int, static_rows: int, seconds: float) -> Line:
    """Time a contender on x [M, K] with an output of n columns, from a cold L2."""
    sets, length = rotation(built.nbytes + x.nbytes + len(x) * n * x.itemsize, clock.l2_bytes)
    try:
        calls = []
        for at in range(sets):
            parts = [part if at == 0 else part.clone() for part in built.parts]
            feed = built.feed(x.clone())
            if len(x) > static_rows:
                for one in feed:
                    torch._dynamo.maybe_mark_dynamic(one, 0)
            calls.append(partial(built.call, *feed, *parts))
    except Exception as error:  # out of memory, most likely
        clock.check_alive()
        return {"status": "failed", "error": one_line(error)}
    return measured(clock, calls, length, partial(built.why_wrong, x), seconds)


def linears(
    clock: Clock,
    shapes: Iterable[tuple[int, int]],
    rows: Sequence[int],
    contenders: Sequence[Contender],
    seconds: float,
    known: Callable[[Line], bool] = lambda line: False,
) -> Iterable[list[Line]]:
    """Lines of every shape at every number of rows, rows by rows, one list for each; those of `NEEDED` first. The first
    contender is timed again after these: how far the two are apart is what a difference means.

    known: of a line without its figures, whether it need not be measured.
    """
    made = [Shape(clock, shape, contenders) for shape in shapes]
    needed = [one for one in contenders if one.kind in NEEDED]
    again = contenders[0]._replace(name=f"{contenders[0].name} again")
    others = [one for one in contenders if one not in needed]
    for some in ([*needed, again], others):
        for m in rows:
            for shape in made:
                n, k = shape.shape
                if left := [one for one in some if not known({"n": n, "k": k, "m": m, "contender": one.name})]:
                    yield shape.lines(m, seconds, left)
