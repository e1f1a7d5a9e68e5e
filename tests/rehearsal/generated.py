"""What Inductor writes for a compiled product on a packed weight, brought to a cubin without a GPU: prints a line
"path rows kernel" for each kernel that compiled. `python -m rehearsal.generated 90`, in tests/."""

import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import rehearsal

if __name__ == "__main__":
    rehearsal.start(sys.argv[1], interpreted=False)

import torch
import torch._inductor.graph
import torch.nn.functional as F
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from hwpq_fx.kernels import Float8Sparse24Tensor, paths
from hwpq_fx.kernels.table import Table
from hwpq_fx.passes import HwpqBackend

N, K = 512, 1024
KERNEL = re.compile(r"^(\w+) = async_compile\.triton\('\w+', '''\n(.*?)'''", re.S | re.M)


class Written(BaseException):
    """Inductor is done: carries its source."""


def stop_here(lowering):
    raise Written(lowering.codegen()[0].value)


def compiled_kernels(source: str) -> Iterator[str]:
    """Names of the Triton kernels in a module of Inductor's, each compiled by Inductor's own means."""
    for name, body in KERNEL.findall(source):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.py"  # Triton reads the source of a function from its file
            file.write_text(body)
            spec = importlib.util.spec_from_file_location(name, file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            (tuner,) = (value for value in vars(module).values() if isinstance(value, CachingAutotuner))
            tuner._precompile_config(tuner.configs[0])
        yield name


def main() -> None:
    torch._inductor.graph.GraphLowering.compile_to_module = stop_here
    # packed on the CPU: here no kernel runs on the other
    weight = Float8Sparse24Tensor.from_hp(torch.randn(N, K, dtype=torch.bfloat16)).cuda()
    bias = torch.randn(N, dtype=torch.bfloat16, device="cuda")
    for path in ("gemv", "tiles", "tiles_fp8"):
        paths.table_of = lambda device, path=path: Table({(1, 1): {1: {path: 1.0}}})
        for rows in (1, 33):
            torch._dynamo.reset()
            x = torch.randn(rows, K, dtype=torch.bfloat16, device="cuda")
            model = torch.compile(lambda x: F.gelu(F.linear(x * 2, weight, bias)), backend=HwpqBackend("inductor"))
            try:
                with torch.no_grad():
                    model(x)
            except Written as written:
                for name in compiled_kernels(str(written)):
                    print(path, rows, name)


if __name__ == "__main__":
    main()
