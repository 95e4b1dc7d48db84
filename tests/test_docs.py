"""The documents say what is there."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from cl_sim import registry
from cl_sim.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_line_of_the_readme_parses() -> None:
    lines = re.findall(r"^(?:\$ )?cl-sim (.+?)(?:\s+#.*)?$", README, flags=re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        words = line.split()
        try:
            main.commands[words[0]].make_context(words[0], words[1:], parent=click.Context(main))
        except click.UsageError as error:
            pytest.fail(f"README: 'cl-sim {line}': {error.message}")


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"^make ([a-z]+)", README, flags=re.MULTILINE))
    assert {"demo", "test"} <= named <= targets


def test_every_strategy_and_stream_is_in_the_readme() -> None:
    for name in [*registry.names("strategy"), *registry.names("stream")]:
        assert f"`{name}`" in README, f"the README does not name {name}"


def test_every_metric_of_a_summary_is_explained() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    source = (ROOT / "cl_sim" / "metrics" / "transfer.py").read_text(encoding="utf-8")
    for name in re.findall(r"\"((?:acc|forgetting|bwt|fwt)_\w+)\"", source):
        assert f"`{name}`" in text, f"docs/metrics.md does not explain {name}"


def test_no_document_names_a_package_registry() -> None:
    for path in [*ROOT.glob("*.md"), *ROOT.glob("*.txt"), *ROOT.glob("*.toml"), ROOT / "Makefile"]:
        assert "://" not in path.read_text(encoding="utf-8").replace("sqlite:///", "").replace(
            "http://127.0.0.1", ""
        ).replace("http://tracking.example", ""), path
