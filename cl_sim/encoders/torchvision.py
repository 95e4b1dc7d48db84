"""Any torchvision classification model, or a timm model, by name: the features before its last layer.

Departures: dropout and stochastic depth are left out, because a run draws from its own random numbers only; GoogLeNet and
Inception have no auxiliary heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_sim.encoders.base import EncoderConfig
from cl_sim.errors import BadConfig, ClSimError, UnknownName
from cl_sim.types import Field

AUXILIARY = ("googlenet", "inception_v3")  # models with more heads than one


@dataclass(frozen=True, kw_only=True)
class NamedModelConfig(EncoderConfig):
    """Settings of a model by name."""

    weights: str = "none"  # none, DEFAULT or the name of published weights (may download); timm: none or DEFAULT


class Features(nn.Module):
    """A model whose answer is its features; grey images are repeated to three channels.

    Shapes: [B, C, H, W] -> [B, dim].
    """

    def __init__(self, model: nn.Module, field: Field) -> None:
        super().__init__()
        self.model = model
        self.repeat = 3 if field.shape[0] == 1 else 1
        with torch.no_grad():
            self.dim: int = self.eval()(torch.zeros(1, *field.shape)).shape[1]
        self.train()

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch."""
        features: Tensor = self.model(x.repeat(1, self.repeat, 1, 1))
        return features.flatten(1)


def names() -> list[str]:
    """Every torchvision classification model."""
    from torchvision import models

    return list(models.list_models(module=models))


def check_timm(name: str) -> None:
    """Is `timm:NAME` a timm model?    Raises: UnknownName; ClSimError if timm is not installed."""
    timm, short = _timm(name), name.removeprefix("timm:").partition(".")[0]
    if not timm.is_model(short):
        raise UnknownName("encoder", name, [f"timm:{one}" for one in timm.list_models()], "cl-sim list encoders")


def build(name: str, cfg: NamedModelConfig, field: Field) -> Features:
    """The model called `torchvision:NAME`, `timm:NAME` or just NAME, without its last layer.

    Raises: ClSimError if weights cannot be had; BadConfig if the model has no such weights or cannot take such images.
    """
    if len(field.shape) != 3:
        raise BadConfig(
            f"encoder '{name}' needs images, but the samples have shape {list(field.shape)}; use --set encoder.name=mlp"
        )
    model = _from_timm(name, cfg) if name.startswith("timm:") else _from_torchvision(name, cfg)
    _remove_noise(model)
    try:
        return Features(model, field)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise BadConfig(
            f"encoder '{name}' cannot take images of {list(field.shape)} ({reason}); see cl-sim list encoders"
        ) from error


def _from_torchvision(name: str, cfg: NamedModelConfig) -> nn.Module:
    from torchvision import models

    short = name.removeprefix("torchvision:")
    published = list(models.get_model_weights(short).__members__)
    if cfg.weights not in ("none", "DEFAULT", *published):
        raise BadConfig(
            f"encoder.weights is '{cfg.weights}'; '{name}' has none, {', '.join(dict.fromkeys(['DEFAULT', *published]))}"
        )
    settings: dict[str, Any] = {"weights": None if cfg.weights == "none" else cfg.weights}
    if short in AUXILIARY:
        settings["aux_logits"] = False
        if cfg.weights == "none":
            settings["init_weights"] = True
    try:
        model: nn.Module = models.get_model(short, **settings)
    except (OSError, RuntimeError) as error:
        raise _no_weights(name, cfg, error) from error
    last = [path for path, part in model.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)][-1]
    _replace(model, last, nn.Identity())
    return model


def _from_timm(name: str, cfg: NamedModelConfig) -> nn.Module:
    if cfg.weights not in ("none", "DEFAULT"):
        raise BadConfig(
            f"encoder.weights is '{cfg.weights}'; timm has none or DEFAULT, other weights are part of the name: "
            "timm:NAME.TAG"
        )
    timm, short = _timm(name), name.removeprefix("timm:")
    try:
        model: nn.Module = timm.create_model(short, pretrained=cfg.weights == "DEFAULT", num_classes=0)
    except (OSError, RuntimeError) as error:
        raise _no_weights(name, cfg, error) from error
    return model


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError:
        raise ClSimError(f"encoder '{name}' needs timm, which is not installed; type: pip install timm") from None
    return timm


def _no_weights(name: str, cfg: NamedModelConfig, error: Exception) -> ClSimError:
    reason = str(error).partition("\n")[0]
    return ClSimError(
        f"the weights '{cfg.weights}' of encoder '{name}' could not be had ({reason}); try again, or --set "
        "encoder.weights=none"
    )


def _remove_noise(model: nn.Module) -> None:
    for path, part in list(model.named_modules()):
        if type(part).__name__ in ("Dropout", "Dropout2d", "StochasticDepth", "DropPath"):
            _replace(model, path, nn.Identity())


def _replace(model: nn.Module, path: str, part: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, part)
