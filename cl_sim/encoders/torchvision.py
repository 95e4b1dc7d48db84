"""Any torchvision classification model, or a timm model, by name; its classifier replaced by its features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_sim.encoders.base import EncoderConfig
from cl_sim.errors import BadConfig, ClSimError, UnknownName
from cl_sim.types import Field

HEADS = ("fc", "classifier", "head", "heads")  # what torchvision calls the part behind the features


@dataclass(frozen=True, kw_only=True)
class NamedModelConfig(EncoderConfig):
    """Settings of a model by name."""

    weights: str = "none"  # none, DEFAULT or the name of published weights (may download)


class Features(nn.Module):
    """A model whose answer is its features; grey images are repeated to three channels."""

    def __init__(self, model: nn.Module, field: Field) -> None:
        super().__init__()
        self.model = model
        self.repeat = 3 if field.shape[0] == 1 else 1
        with torch.no_grad():
            self.dim = self.eval()(torch.zeros(2, *field.shape)).shape[1]
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch.    Shapes: [B, C, H, W] -> [B, dim]."""
        features: Tensor = self.model(x.repeat(1, self.repeat, 1, 1))
        return features.flatten(1)


def names() -> list[str]:
    """Every torchvision classification model."""
    from torchvision import models

    return list(models.list_models(module=models))


def build(name: str, cfg: NamedModelConfig, field: Field) -> Features:
    """The model called `torchvision:NAME`, `timm:NAME` or just NAME.

    Raises: UnknownName; ClSimError if weights cannot be had; BadConfig if the model cannot take such images.
    """
    if len(field.shape) != 3:
        raise BadConfig(f"encoder '{name}' needs images, but the samples are table rows; use --set encoder.name=mlp")
    model = _timm(name.removeprefix("timm:"), cfg) if name.startswith("timm:") else _torchvision(name, cfg)
    try:
        return Features(model, field)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise BadConfig(f"encoder '{name}' cannot take images of {list(field.shape)}: {error}") from error


def _torchvision(name: str, cfg: NamedModelConfig) -> nn.Module:
    from torchvision import models

    short = name.removeprefix("torchvision:")
    if short not in names():
        raise UnknownName("encoder", name, names(), "cl-sim list encoders")
    model = _loaded(name, cfg, lambda: models.get_model(short, weights=None if cfg.weights == "none" else cfg.weights))
    head = next(part for part in HEADS if hasattr(model, part))
    setattr(model, head, nn.Identity())
    return model


def _timm(name: str, cfg: NamedModelConfig) -> nn.Module:
    try:
        import timm
    except ImportError:
        raise ClSimError(f"encoder 'timm:{name}' needs timm; type: pip install 'cl-sim[timm]'") from None
    if name not in timm.list_models():
        raise UnknownName("encoder", f"timm:{name}", [f"timm:{n}" for n in timm.list_models()], "cl-sim list encoders")
    return _loaded(name, cfg, lambda: timm.create_model(name, pretrained=cfg.weights != "none", num_classes=0))


def _loaded(name: str, cfg: NamedModelConfig, make: Callable[[], nn.Module]) -> nn.Module:
    try:
        return make()
    except (ValueError, KeyError) as error:
        raise BadConfig(f"encoder.weights is '{cfg.weights}', which {name} does not have: {error}") from error
    except OSError as error:
        raise ClSimError(f"the weights '{cfg.weights}' of {name} could not be downloaded: {error}") from error
