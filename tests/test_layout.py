"""Who may import whom, what the core needs, and how long the command line takes to answer."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cl_sim", "strategies", "streams")


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", ["strategies", "streams"])
def test_components_import_neither_each_other_nor_the_other_side(package: str) -> None:
    for path in (ROOT / package).glob("*.py"):
        ours = {name for name in imports(path) if name.split(".")[0] in ("strategies", "streams")}
        assert not ours, f"{path.name} imports {ours}"


def test_the_core_names_no_component() -> None:
    for path in (ROOT / "cl_sim").rglob("*.py"):
        ours = {name for name in imports(path) if name.split(".")[0] in ("strategies", "streams")}
        assert not ours, f"{path} imports {ours}"


HEAVY = ("mlflow", "matplotlib", "pyarrow", "sklearn", "avalanche", "torchvision", "PIL", "scipy", "pandas")


def test_the_core_imports_with_only_torch_and_numpy() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name not in ("cli.py", "commands.py", "launch.py")
    ]
    script = (
        "import sys, importlib\n"
        f"blocked = {(*HEAVY, 'rich', 'click')!r}\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in blocked: raise ImportError(f'{name} must be imported where it is used')\n"
        "sys.meta_path.insert(0, Refuse())\n"
        f"for name in {modules!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_help_answers_without_torch_in_half_a_second() -> None:
    """Processor time, so that other work on the machine does not count."""
    script = "import sys; from cl_sim.cli import main; main(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60, check=True)
        after = os.times()
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append(spent)
    assert min(seconds) < 0.5, f"--help took {min(seconds):.2f} s of processor time at best"
