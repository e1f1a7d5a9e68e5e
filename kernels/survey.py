"""Compile every kernel of whole modules, without a GPU and in processes of their own: `hwpq-fx kernels`.

Fresh processes, because TRITON_INTERPRET=1 counts when triton is first imported: kernels imported under it can be run
on a CPU and not be compiled any more. This is the one place that switches it off.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from pkgutil import iter_modules
from typing import NamedTuple

from .cubin import compile_specimen


class Finding(NamedTuple):
    """What came of one specimen, in plain values."""

    module: str
    kernel: str
    specimen: str
    arch: int
    error: str = ""
    """Why it did not compile: all that follows is empty then."""
    registers: int = 0
    spills: int = 0
    stack: int = 0
    shared: int = 0
    warps: int = 0
    programs: int = 0
    """Programs that fit on a multiprocessor at once."""
    instructions: Mapping[str, int] = {}
    loop: Mapping[str, int] = {}
    """Instructions of the longest innermost loop."""
    sass: str = ""

    @property
    def passed(self) -> bool:
        """It compiled, spills nothing, and a multiprocessor holds at least one program."""
        return not self.error and not self.spills and self.programs > 0


def kernel_modules() -> list[str]:
    """Full names of this package's `*_triton` modules."""
    found = iter_modules([str(Path(__file__).parent)])
    return [f"{__package__}.{one.name}" for one in found if one.name.endswith("_triton")]


def survey(archs: Sequence[int], modules: Sequence[str], name: str = "", jobs: int = 0) -> Iterator[Finding]:
    """Compile every specimen of `modules`, or those called `name`, for every arch; yields findings in no order.

    jobs: processes at work, 0 for one per CPU. Raises RuntimeError, with what they last said, where the processes
    fail (a module that cannot be imported, a compiler that crashes); what one specimen raises is in its finding.
    """
    work = json.dumps([list(archs), list(modules), name, jobs])
    command = [sys.executable, "-m", f"{__package__}.survey", work]
    env = os.environ | {"TRITON_INTERPRET": "0"}
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=said, text=True) as child:
            assert child.stdout
            try:
                for line in child.stdout:
                    yield Finding(*json.loads(line))
            except BaseException:
                child.terminate()
                raise
        if child.returncode:
            said.seek(0)
            raise RuntimeError(f"compiling kernels failed:\n{said.read()[-2000:]}")


def _examine(module: str, arch: int, index: int) -> Finding:
    specimen = import_module(module).specimens(arch)[index]
    kernel = specimen.kernel.fn.__name__
    try:
        cubin = compile_specimen(specimen, arch)
    except Exception as error:
        return Finding(module, kernel, specimen.name, arch, f"{type(error).__name__}: {error}"[:2000])
    loop: Counter[str] = max(cubin.loops(), key=Counter.total, default=Counter())
    return Finding(
        module,
        kernel,
        specimen.name,
        arch,
        registers=cubin.registers,
        spills=cubin.spills,
        stack=cubin.stack,
        shared=cubin.shared,
        warps=cubin.warps,
        programs=cubin.programs(),
        instructions=cubin.instructions(),
        loop=loop,
        sass=cubin.sass,
    )


def _interrupt(number: int, frame: object) -> None:
    """Once: Ctrl-C reaches every process of a terminal, and then `survey` ends this one as well."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt


def _leave_to_parent() -> None:
    """A worker that Ctrl-C ends may take the lock of the queue with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _main(work: str) -> None:
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, _interrupt)
    archs, modules, name, jobs = json.loads(work)
    # Triton prints to stdout what ptxas complains about: only findings may go there
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # many problems are launched alike: what differs in nothing but the name is compiled once
    names: dict[str, list[str]] = {}
    tasks: dict[str, tuple[str, int, int]] = {}
    for module, arch in product(modules, archs):
        for index, specimen in enumerate(import_module(module).specimens(arch)):
            if name in ("", specimen.name):
                launch = repr((arch, module, *specimen[1:]))
                names.setdefault(launch, []).append(specimen.name)
                tasks.setdefault(launch, (module, arch, index))
    # forked workers have triton and the modules imported already
    with ProcessPoolExecutor(jobs or os.cpu_count(), get_context("fork"), _leave_to_parent) as pool:
        try:
            started = {pool.submit(_examine, *task): names[launch] for launch, task in tasks.items()}
            for done in as_completed(started):
                for called in started[done]:
                    print(json.dumps(done.result()._replace(specimen=called)), file=out, flush=True)
        except (BrokenPipeError, KeyboardInterrupt) as error:  # nobody wants the rest
            pool.shutdown(cancel_futures=True)
            if isinstance(error, KeyboardInterrupt):
                sys.exit("interrupted")


if __name__ == "__main__":
    _main(sys.argv[1])
