"""What optimisers need beside torch's own."""

from __future__ import annotations

from torch import nn


def trainable(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn: all but those of a frozen encoder."""
    return [parameter for parameter in net.parameters() if parameter.requires_grad]
