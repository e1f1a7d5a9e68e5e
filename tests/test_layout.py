"""How the three folders install and import."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    """Run `code` with the repository as the working directory, which is then the first place to import from."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_bare_kernels_registers_nothing():
    # transformers imports `kernels` to learn its version: here that is our folder
    out = run(
        "import kernels, sys\n"
        "print([name for name in sys.modules if name.startswith('kernels.')], hasattr(kernels, 'linear24'))\n"
        "from transformers.utils import is_kernels_available\n"
        "print(is_kernels_available())\n"
    )
    assert out.split("\n")[:2] == ["[] False", "False"]


def test_imports_run_one_way():
    """hwpq_fx -> passes -> kernels, and never by a bare name."""
    for folder, forbidden in (
        ("kernels", ("hwpq_fx.passes", "from hwpq_fx ", "import passes")),
        ("passes", ("from hwpq_fx ", "from hwpq_fx.c", "from kernels", "import kernels")),
        ("hwpq_fx", ("from kernels", "import kernels", "from passes", "import passes")),
    ):
        for file in (ROOT / folder).glob("*.py"):
            text = file.read_text(encoding="utf-8")
            assert not [line for line in text.splitlines() if line.strip().startswith(forbidden)], file
            assert not any(f"import {word}" in text for word in forbidden if "." in word), file


def test_works_without_triton():
    out = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hwpq_fx\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()\n"
        "model = hwpq_fx.convert(torch.compile(model), [torch.randn(3, 64)])\n"
        "print(tuple(model(torch.randn(2, 64)).shape))\n"
    )
    assert out.strip().endswith("(2, 64)")
