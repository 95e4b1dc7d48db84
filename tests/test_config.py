"""Settings: read, checked, written down, read again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from cl_sim import config, preset, registry
from cl_sim.config import RunConfig, assign, build, from_dict, merge
from cl_sim.errors import BadConfig, UnknownName

BASE = {"strategy": {"name": "er"}, "stream": {"name": "synthetic"}, "encoder": {"name": "mlp"}}


@dataclass(frozen=True, kw_only=True)
class Sample:
    count: int = 1
    rate: float = 0.5
    name: str = "a"
    kind: Literal["x", "y"] = "x"
    flag: bool = False
    sizes: tuple[int, ...] = ()


def test_a_configuration_survives_the_way_through_plain_values() -> None:
    made = from_dict(merge(BASE, {"strategy": {"capacity": 77}, "seeds": [3, 4], "augment": ["flip"]}))
    assert from_dict(made.to_dict()) == made
    assert made.strategy.config.capacity == 77


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("strategy.capacity=1000", ("strategy", "capacity"), 1000),
        ("stream.order=fixed", ("stream", "order"), "fixed"),
        ("stream.order=3,1,0,2", ("stream", "order"), "3,1,0,2"),
        ("strategy.joint_pass=true", ("strategy", "joint_pass"), True),
        ("encoder.hidden=[8, 4]", ("encoder", "hidden"), [8, 4]),
        ("strategy.lr=1e-3", ("strategy", "lr"), 1e-3),
        ("data=/a=b", ("data",), "/a=b"),
    ],
)
def test_set_reads_values_as_toml_and_text_otherwise(assignment: str, path: tuple[str, ...], value: object) -> None:
    settings: dict[str, object] = {}
    assign(settings, assignment)
    for key in path:
        settings = settings[key]  # type: ignore[assignment]
    assert settings == value


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"cuont": 1}, ["'part.cuont'", "did you mean 'count'", "count, rate"]),
        ({"count": 1.5}, ["1.5", "whole number"]),
        ({"count": True}, ["True", "whole number"]),
        ({"rate": "fast"}, ["'fast'", "a number"]),
        ({"kind": "z"}, ["'z'", "x, y"]),
        ({"flag": 1}, ["true or false"]),
        ({"sizes": [1, "b"]}, ["'b'", "whole number"]),
    ],
)
def test_a_bad_setting_is_named_with_what_is_allowed(values: dict[str, object], words: list[str]) -> None:
    with pytest.raises(BadConfig) as caught:
        build(Sample, values, "part")
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_integers_pass_as_numbers_and_single_values_as_tuples() -> None:
    made = build(Sample, {"rate": 1, "sizes": 3}, "part")
    assert made == Sample(rate=1.0, sizes=(3,))
    assert isinstance(made.rate, float)


@pytest.mark.parametrize("assignment", ["capacity", "=3", "a..b=1"])
def test_set_without_a_key_or_value_is_refused(assignment: str) -> None:
    with pytest.raises(BadConfig, match="KEY=VALUE"):
        assign({}, assignment)


def test_a_seed_named_twice_is_refused() -> None:
    with pytest.raises(BadConfig, match="twice"):
        from_dict({**BASE, "seeds": [1, 1]})


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'er'"):
        registry.resolve("strategy", "err")
    with pytest.raises(UnknownName, match="did you mean 'split"):
        registry.resolve("stream", "spilt")
    with pytest.raises(UnknownName, match="did you mean 'er-cifar10-m200'"):
        preset.read("er-cifar10-m20")


def test_names_carry_their_data() -> None:
    assert registry.resolve("stream", "split-cifar10") == ("split", {"data": "cifar10"})
    assert registry.resolve("stream", "split-folder:/a-b/c") == ("split", {"data": "folder:/a-b/c"})
    with pytest.raises(BadConfig, match="takes no name"):
        registry.resolve("stream", "synthetic-cifar10")


@pytest.mark.parametrize("name", preset.names())
def test_every_preset_is_a_complete_configuration(name: str) -> None:
    made = from_dict(preset.read(name))
    assert isinstance(made, RunConfig)
    if "-m" in name.replace("-mini", ""):
        assert made.strategy.config.capacity == int(name.rsplit("-m", 1)[1])


def test_a_missing_or_broken_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="no settings file"):
        config.read_toml(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("a = [")
    with pytest.raises(BadConfig, match="not valid TOML"):
        config.read_toml(tmp_path / "broken.toml")


def test_arms_are_variants_of_a_strategy_filed_by_their_setting() -> None:
    plain, arm = (preset.read(f"{start}-cifar10-short-m200")["strategy"] for start in ("er", "random-er"))
    assert plain == {"name": "er", "capacity": 200}
    assert arm == {"name": "er", "capacity": 200, "saa": "random"}
    assert preset.filed("random-er-cifar10-short-m200") == ("cifar10-short", "random-er-m200")
    assert preset.filed("saa-fixmatch-cifar10-labels5") == ("cifar10-labels5", "saa-fixmatch")
    assert preset.filed("er-cifar10-m200") is None
    assert preset.read("saa-fixmatch-cifar10-labels5")["strategy"]["saa"] is True
