"""Encoders, each written for one run: found by name, made for the samples of a stream."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from cl_sim.encoders.base import EncoderConfig, Pixels
from cl_sim.errors import UnknownName
from cl_sim.types import Field


class Entry(NamedTuple):
    """Where an encoder is made: module of this package, name of its settings."""

    module: str
    config: str


OWN = {
    "mlp": Entry("mlp", "MLPConfig"),
    "reduced_resnet18": Entry("resnet", "ReducedResNet18Config"),
    "resnet18": Entry("resnet", "ResNet18Config"),
}
NAMED = Entry("torchvision", "NamedModelConfig")
SMALLEST_IMAGE = 28  # pixels; below, a perceptron is the default


def names() -> list[str]:
    """Our own encoders, then the forms that name a model of another package."""
    return [*OWN, "torchvision:NAME", "timm:NAME"]


def config_class(name: str) -> type[EncoderConfig]:
    """The settings of an encoder.    Raises: UnknownName."""
    entry = _entry(name)
    found: type[EncoderConfig] = getattr(_module(entry), entry.config)
    return found


def build(name: str, cfg: Any, field: Field) -> Pixels:
    """A fresh encoder for samples of this field, behind its pixel scaling."""
    module = _module(_entry(name))
    made = module.build(cfg, field) if name in OWN else module.build(name, cfg, field)
    return Pixels(made, cfg, field)


def default(field: Field) -> str:
    """What a stream gets if nothing is named: the reduced ResNet-18 for images, else a perceptron."""
    image = len(field.shape) == 3 and min(field.shape[1:]) >= SMALLEST_IMAGE
    return "reduced_resnet18" if image else "mlp"


def _entry(name: str) -> Entry:
    if name in OWN:
        return OWN[name]
    if name.startswith(("torchvision:", "timm:")):
        return NAMED
    from cl_sim.encoders import torchvision

    if name in torchvision.names():
        return NAMED
    raise UnknownName("encoder", name, [*OWN, *torchvision.names()], "cl-sim list encoders")


def _module(entry: Entry) -> Any:
    return importlib.import_module(f"cl_sim.encoders.{entry.module}")
