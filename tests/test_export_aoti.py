"""A converted model leaves Python: `torch.export`, its files, and packages of AOTInductor."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import Dim

import hwpq_fx
from hwpq_fx import HWPQConfig
from models import llama, mlp, tokens, vectors


class Logits(nn.Module):
    """What a package is made of: transformers' outputs are a class that only transformers can read back."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


def close(y, expected):
    # Inductor contracts a multiplication and an addition here and there; an input may round to the next FP8 value
    assert y.shape == expected.shape
    assert (y - expected).norm() <= 5e-3 * expected.norm()


def exported(model, example, **dynamic):
    """The program for `example`, once it gives the same bits as the model."""
    with torch.no_grad():
        program = torch.export.export(model, (), example, strict=False, dynamic_shapes=dynamic)
        assert program.module()(**example).equal(model(**example))
    return program


def in_new_process(package: Path, inputs: list, imports: str) -> list:
    """What the package gives for each of `inputs` in a process that imports `imports`."""
    torch.save(inputs, package.with_suffix(".in"))
    code = (
        f"import {imports}, torch, sys\n"
        f"model = torch._inductor.aoti_load_package({str(package)!r})\n"
        f"inputs = torch.load({str(package.with_suffix('.in'))!r})\n"
        f"torch.save([model(**one) for one in inputs], {str(package.with_suffix('.out'))!r})\n"
        "print('hwpq_fx' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr)
    assert done.stdout.split()[-1] == str(imports == "hwpq_fx")
    return torch.load(package.with_suffix(".out"))


@torch.no_grad()
def test_a_package_that_needs_nothing_of_ours(tmp_path):
    """Traced with more rows than the packed weight is read for, it holds plain products: any process runs it."""
    model = hwpq_fx.convert(mlp())
    program = exported(model, {"input": vectors(2)}, input={0: Dim("batch", min=1, max=64)})
    torch.export.save(program, tmp_path / "saved.pt2")
    again = torch.export.load(tmp_path / "saved.pt2").module()
    file = Path(aoti_compile_and_package(program, package_path=str(tmp_path / "mlp.pt2")))
    package, batches = aoti_load_package(str(file)), [{"input": vectors(size)} for size in (1, 2, 7)]
    for one, y in zip(batches, in_new_process(file, batches, "torch.nn"), strict=True):
        assert again(**one).equal(model(**one))
        close(y, model(**one))
        assert package(**one).equal(y)


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="AOTInductor gave ops another dtype than asked for (pytorch/pytorch#173562)"
)
@torch.no_grad()
def test_a_package_with_our_ops(tmp_path):
    """With the packed weight alone, it is unpacked by an op of ours, which `import hwpq_fx` brings."""
    model = hwpq_fx.convert(mlp(), config=HWPQConfig(layout="packed", activation="none"))
    example = {"input": vectors(2)}
    file = Path(aoti_compile_and_package(exported(model, example), package_path=str(tmp_path / "mlp.pt2")))
    with pytest.raises(RuntimeError, match="hwpq_fx::cpu_unpack24"):
        in_new_process(file, [example], "torch.nn")
    (y,) = in_new_process(file, [example], "hwpq_fx")
    close(y, model(**example))


@torch.no_grad()
def test_logits_of_a_language_model(tmp_path):
    model = Logits(hwpq_fx.convert(llama(), [tokens()]))
    batch = Dim("batch", min=1, max=16)
    program = exported(model, tokens(2), input_ids={0: batch}, attention_mask={0: batch})
    file = Path(aoti_compile_and_package(program, package_path=str(tmp_path / "llama.pt2")))
    package, batches = aoti_load_package(str(file)), [tokens(size) for size in (2, 3)]
    for one, y in zip(batches, in_new_process(file, batches, "hwpq_fx"), strict=True):
        close(y, model(**one))
        assert package(**one).equal(y)
        assert (y.argmax(-1) == model(**one).argmax(-1)).float().mean() > 0.95
