"""A strategy and a stream from another package, found by entry point, trained, and held to the conformance kit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

STRATEGY = '''"""Replays nothing, forgets slowly: a plug-in for this test.

Source: ours.    Departures: none.
"""

from dataclasses import dataclass

from torch.nn import functional as F
from torch.optim import SGD

from cl_sim.encoders.classifier import Classifier
from cl_sim.optim import trainable
from cl_sim.runs import per_run
from cl_sim.strategy import Strategy


@dataclass(frozen=True, kw_only=True)
class SlowConfig:
    lr: float = 0.05


class Slow(Strategy):
    Config, tasks = SlowConfig, frozenset({"classify"})

    def __init__(self, cfg, env):
        super().__init__(cfg, env)
        self.net = env.lift(lambda: Classifier(env.encoder(), env.classes))
        self.sgd = SGD(trainable(self.net), lr=cfg.lr)

    def observe(self, new):
        loss = per_run(F.cross_entropy)(self.net(self.env.augment(new)["x"]), new["y"])
        self.descend(loss, self.sgd)
        return {"loss": loss}

    def predict(self, batch):
        return self.net(batch["x"])
'''

STREAM = '''"""The made-up stream with fewer classes, under another name."""

from dataclasses import dataclass

from streams.synthetic import Synthetic, SyntheticConfig


@dataclass(frozen=True, kw_only=True)
class TinyConfig(SyntheticConfig):
    classes: int = 4
    tasks: int = 2


class Tiny(Synthetic):
    Config = TinyConfig
'''

PROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "cl-sim-tiny-plugin"
version = "0.1"
[project.entry-points."cl_sim.strategies"]
slow = "tiny_plugin.slow:Slow"
[project.entry-points."cl_sim.streams"]
tiny = "tiny_plugin.tiny:Tiny"
[tool.setuptools]
packages = ["tiny_plugin"]
"""

CONFORMS = """
from cl_sim.testing import CHECKS, toy
for check in CHECKS:
    check(lambda seeds: toy("slow", seeds))
print("checked", len(CHECKS))
"""


@pytest.fixture(scope="module")
def plugged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the plug-in is installed, in a folder of its own."""
    import os

    source = tmp_path_factory.mktemp("plugin")
    (source / "tiny_plugin").mkdir()
    (source / "tiny_plugin" / "__init__.py").touch()
    (source / "tiny_plugin" / "slow.py").write_text(STRATEGY)
    (source / "tiny_plugin" / "tiny.py").write_text(STREAM)
    (source / "pyproject.toml").write_text(PROJECT)
    site = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(site), str(source)], check=True, timeout=120)
    return {**os.environ, "PYTHONPATH": str(site)}


def run(words: list[str], environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_plugged_in_strategy_and_stream_are_listed_and_run(plugged: dict[str, str], tmp_path: Path) -> None:
    cl_sim = [sys.executable, "-m", "cl_sim.cli"]
    assert "slow" in run([*cl_sim, "list", "strategies"], plugged, tmp_path)
    text = run([*cl_sim, "run", "slow", "tiny", "--seeds", "0-1", "--tracking-uri", "none"], plugged, tmp_path)
    assert "acc_end" in text


def test_the_conformance_kit_runs_on_a_plugged_in_strategy(plugged: dict[str, str], tmp_path: Path) -> None:
    assert "checked 11" in run([sys.executable, "-c", CONFORMS], plugged, tmp_path)
