"""How the three folders install and import."""

import ast
import re
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


def imported(file: Path) -> set[str]:
    """Absolute names of what a file imports; its own folder's relative imports are left out."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module or "")
    return found


def test_imports_run_one_way():
    """hwpq_fx -> passes -> kernels, and never by a bare name."""
    for folder, below in (
        ("kernels", ()),
        ("passes", ("hwpq_fx.kernels",)),
        ("hwpq_fx", ("hwpq_fx.kernels", "hwpq_fx.passes")),
    ):
        for file in (ROOT / folder).rglob("*.py"):
            for name in imported(file):
                assert name.split(".")[0] not in ("kernels", "passes"), f"{file}: {name}"
                if name.split(".")[0] == "hwpq_fx":
                    assert name.startswith(below), f"{file}: {name}"


def test_every_folder_with_code_is_in_the_wheel():
    listed = re.search(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    below = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "hwpq_fx").rglob("*.py")}
    assert listed and set(ast.literal_eval(listed[1])) == below | {"hwpq_fx.passes", "hwpq_fx.kernels"}


def test_works_without_triton():
    out = run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, hwpq_fx\n"
        "model = torch.nn.Sequential(torch.nn.Linear(64, 64)).eval()\n"
        "model = hwpq_fx.convert(torch.compile(model), [torch.randn(3, 64)])\n"
        "print(tuple(model(torch.randn(2, 64)).shape))\n"
    )
    assert out.strip().endswith("(2, 64)")
