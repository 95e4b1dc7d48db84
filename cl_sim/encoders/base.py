"""What all encoders share: their common settings, and the wrapper that turns stored pixels into numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cl_sim.errors import BadConfig
from cl_sim.types import Field


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Settings of every encoder."""

    frozen: bool = False  # do not train it; its BatchNorm keeps its statistics
    mean: tuple[float, ...] = ()  # per channel, subtracted from values in [0, 1]; empty: nothing
    std: tuple[float, ...] = ()  # per channel, divided by; empty: nothing

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise BadConfig(
                f"encoder.mean has {len(self.mean)} values and encoder.std {len(self.std)}; give both or none"
            )
        if self.std and min(self.std) <= 0:
            raise BadConfig(f"encoder.std is {list(self.std)}; each value must be above 0")


class Pixels(nn.Module):
    """An encoder behind its input scaling: bytes become [0, 1], then mean and std, if there are any.

    With precision bf16 it computes in bfloat16 where autocast deems that safe, on weights kept in float32; its features, and
    so all that stands on them (heads, similarities, losses, memories), are float32 again.

    A frozen encoder asks for no gradients and stays in evaluation mode, whatever `train` says; give optimisers
    `cl_sim.optim.trainable(net)`.

    Shapes: [B, *shape] uint8 or float -> [B, dim].    Raises: BadConfig if mean and channels differ in number.
    """

    mean: Tensor
    std: Tensor
    dim: int

    def __init__(self, encoder: Any, cfg: EncoderConfig, field: Field, precision: str = "float32") -> None:
        super().__init__()
        self.bf16 = precision == "bf16"
        channels = field.shape[0] if field.shape else 1
        if cfg.mean and len(cfg.mean) != channels:
            raise BadConfig(
                f"encoder.mean has {len(cfg.mean)} values, but the samples have {channels} channels; give one for each"
            )
        self.encoder, self.frozen, self.scaled, self.dim = encoder, cfg.frozen, bool(cfg.mean), encoder.dim
        if self.scaled:
            tail = (1,) * (len(field.shape) - 1)
            self.register_buffer("mean", torch.tensor(cfg.mean).view(-1, *tail))
            self.register_buffer("std", torch.tensor(cfg.std).view(-1, *tail))
        if self.frozen:
            self.encoder.requires_grad_(False)
            self.encoder.eval()

    def train(self, mode: bool = True) -> Pixels:
        """Training mode, but a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch."""
        if x.dtype == torch.uint8:
            x = x / 255
        if self.scaled:
            x = (x - self.mean) / self.std
        features: Tensor
        if not self.bf16:
            features = self.encoder(x)
            return features
        with torch.autocast(x.device.type, torch.bfloat16):
            features = self.encoder(x)
        return features.float()
