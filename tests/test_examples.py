"""The examples run as they stand, each in a process of its own, and do what they say."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

SAYS = {
    "explain.py": ["linear24"],
    "quickstart.py": ["7 of 15 layers converted", "2:4 fp8"],
    "torchao_flow.py": ["Float8Tensor", "Float8Sparse24Tensor", "logits (4, 32, 1000)"],
    "transformers_save_load.py": ["model.safetensors.index.json", "same logits: True", "6 weights 2:4 while loading"],
    "offloaded.py": ["layers converted", "2:4 fp8", "tensor("],
    "evaluate.py": ["none", "energy", "cg", "±"],
    "lm_eval_local.py": ["7 of 8 layers converted", "'acc,none':", "'sample_len': 20"],
}
NEEDS = {"lm_eval_local.py": "lm_eval"}


def run(example, tmp_path):
    if (needed := NEEDS.get(example)) and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed")
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / example)]
    made = subprocess.run(
        command, env=os.environ | quiet, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=500
    )
    assert made.returncode == 0, made.stderr
    return made.stdout


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(example, tmp_path):
    out = run(example, tmp_path)
    assert all(words in out for words in SAYS[example]), out
    if example == "evaluate.py":  # the better the compensation, the less is lost
        lost = [float(line.split("loss ")[1].split()[0]) for line in out.splitlines()]
        assert len(lost) == 3 and lost[0] > lost[1] > lost[2] > 0
    if example == "torchao_flow.py":
        kinds = dict(line.split() for line in out.splitlines() if line.startswith("model."))
        assert kinds["model.layers.1.self_attn.q_proj.weight"] == "Float8Tensor"
        assert kinds["model.layers.1.self_attn.o_proj.weight"] == "Float8Sparse24Tensor"
        assert kinds["model.layers.1.mlp.down_proj.weight"] == "Float8Sparse24Tensor"
    assert not list(tmp_path.glob("*.safetensors"))
