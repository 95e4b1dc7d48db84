"""Encoders, each written for one run: found by name, made for the samples of a stream."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from torch import nn

from cl_sim.encoders.base import Pixels
from cl_sim.errors import BadConfig, UnknownName
from cl_sim.types import Field, Fields


class Entry(NamedTuple):
    """Where an encoder is made: a module of this package with a `build`, and the name of its settings."""

    module: str
    config: str


INSTANCES = {
    "crop": Entry("instances", "CropConfig"),
    "crop+mask": Entry("instances", "CropConfig"),
    "given": Entry("instances", "GivenConfig"),
    "query": Entry("queries", "QueryConfig"),
    "roi": Entry("instances", "RoiConfig"),
}
ENCODERS = INSTANCES | {
    "mlp": Entry("mlp", "MLPConfig"),
    "reduced_resnet18": Entry("resnet", "ReducedResNet18Config"),
    "resnet18": Entry("resnet", "ResNet18Config"),
    "sasrec": Entry("transformer", "SASRecConfig"),
    "wide_resnet": Entry("resnet", "WideResNetConfig"),
}
OTHERS = Entry("torchvision", "NamedModelConfig")
SMALLEST_IMAGE = 28  # pixels; below, a perceptron is the default


def names() -> list[str]:
    """Our own encoders, then the forms that name a model of another package."""
    return [*ENCODERS, "torchvision:NAME", "timm:NAME"]


def config_class(name: str) -> type:
    """The settings of an encoder.    Raises: UnknownName; ClSimError for a timm model without timm."""
    entry = _entry(name)
    found: type = getattr(_module(entry), entry.config)
    return found


def make(name: str, cfg: Any, fields: Fields, classes: int, precision: str = "float32") -> nn.Module:
    """A fresh encoder for the samples of a stream: of its `x`, of its histories of `items`, or of the instances of its clips.

    Raises: UnknownName; BadConfig for samples that the encoder cannot take.
    """
    clips = "boxes" in fields
    if clips != (name in INSTANCES):
        kind, fit = ("clips of instances", "crop") if clips else ("no clips of instances", "mlp")
        raise BadConfig(f"encoder is '{name}', but the samples are {kind}; use --set encoder.name={fit}")
    if precision != "float32" and (clips or name == "sasrec"):
        raise BadConfig(f"precision is '{precision}', but encoder '{name}' computes in float32; leave --precision out")
    if clips:
        embedder: nn.Module = _module(ENCODERS[name]).build(name, cfg, fields, classes)
        return embedder
    if ("items" in fields) != (name == "sasrec"):
        kind, fit = ("histories of items", "sasrec") if "items" in fields else ("no histories of items", "mlp")
        raise BadConfig(f"encoder is '{name}', but the samples are {kind}; use --set encoder.name={fit}")
    if name != "sasrec":
        return build(name, cfg, fields["x"], precision)
    sequence: nn.Module = _module(ENCODERS[name]).build(cfg, classes - 1, fields["items"].shape[0])
    return sequence


def build(name: str, cfg: Any, field: Field, precision: str = "float32") -> Pixels:
    """A fresh encoder for samples of this field, behind its pixel scaling.

    `resnet18` is our own one with a 3x3 stem; torchvision's is `torchvision:resnet18`.

    Raises: UnknownName; BadConfig for samples that the encoder cannot take.
    """
    module = _module(_entry(name))
    made = module.build(cfg, field) if name in ENCODERS else module.build(name, cfg, field)
    return Pixels(made, cfg, field, precision)


def usual(fields: Fields) -> str:
    """What a stream gets if nothing is named: a transformer for histories, crops for clips, else what its samples need."""
    if "boxes" in fields:
        return "given" if "features" in fields else "crop"
    return "sasrec" if "items" in fields else default(fields["x"])


def default(field: Field) -> str:
    """For samples of this field: the reduced ResNet-18 for images of 28 pixels or more, else a perceptron."""
    image = len(field.shape) == 3 and min(field.shape[1:]) >= SMALLEST_IMAGE
    return "reduced_resnet18" if image else "mlp"


def _entry(name: str) -> Entry:
    if name in ENCODERS:
        return ENCODERS[name]
    from cl_sim.encoders import torchvision

    known = torchvision.names()
    if name.startswith("timm:"):
        torchvision.check_timm(name)
    elif name.removeprefix("torchvision:") not in known:
        prefix = "torchvision:" if name.startswith("torchvision:") else ""
        raise UnknownName("encoder", name, [*ENCODERS, *(prefix + one for one in known)], "cl-sim list encoders")
    return OTHERS


def _module(entry: Entry) -> Any:
    return importlib.import_module(f"cl_sim.encoders.{entry.module}")
