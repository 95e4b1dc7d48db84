"""What is timed: a strategy on made-up images of 32 pixels, the bare passes of its step, and Avalanche's own loop."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from cl_sim import encoders, registry, session
from cl_sim.capture import Captured
from cl_sim.config import from_dict, merge
from cl_sim.encoders.base import Pixels
from cl_sim.encoders.classifier import Classifier
from cl_sim.types import Field

CLASSES, SIZE, BATCH, CAPACITY = 10, 32, 10, 200
IMAGE = Field((3, SIZE, SIZE), torch.uint8)


class Pass(NamedTuple):
    """One pass through the encoder."""

    batch: int
    learns: bool  # does a gradient flow back?


class Learner:
    """A strategy that has come to its steady state; `step` gathers the next batch and learns it."""

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        *,
        device: str = "cpu",
        runs: int = 1,
        precision: str = "float32",
        captured: bool = False,
    ) -> None:
        base = {
            "strategy": {"name": name},
            "stream": {"name": "synthetic", "classes": CLASSES, "size": SIZE, "per_class": 400},
            "encoder": {"name": "reduced_resnet18"},
            "augment": list(registry.load("strategy", name).views),
            "seeds": list(range(runs)),
            "stack": runs,
            "device": device,
            "precision": precision,
        }
        config = from_dict(merge(base, settings))
        self.stream = session.build_stream(config, config.seeds)
        self.strategy = session.build_strategy(config, self.stream, config.seeds)
        self.strategy.train()
        self.learns = Captured(self.strategy) if captured else self.strategy
        self.steps = count()

    def settle(self) -> Learner:
        """Learn until the memory has what a step recalls."""
        while not self.strategy.steady:
            self.step()
        self.step()
        return self

    def step(self) -> None:
        """Learn one batch, with all that belongs to it."""
        self.learns.observe(self.stream.batch(next(self.steps) % len(self.stream)))

    def passes(self) -> list[Pass]:
        """The passes that the images of one step make through the encoder."""
        seen: list[Pass] = []

        def note(module: Any, inputs: Any, output: Any) -> None:
            seen.append(Pass(len(inputs[0]), torch.is_grad_enabled()))

        handles = [part.register_forward_hook(note) for part in self.strategy.modules() if isinstance(part, Pixels)]
        self.step()
        for handle in handles:
            handle.remove()
        return seen


class Bare:
    """Forward and backward passes of the given batches through the network alone, in channels-last."""

    def __init__(self, passes: list[Pass], device: str = "cpu", **encoder: Any) -> None:
        cfg = encoders.config_class("reduced_resnet18")(**encoder)
        self.net = Classifier(encoders.build("reduced_resnet18", cfg, IMAGE).encoder, CLASSES).to(device)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.inputs = [
            (learns, torch.rand(n, *IMAGE.shape, device=device).contiguous(memory_format=torch.channels_last))
            for n, learns in passes
        ]
        self.targets = [torch.randint(CLASSES, (len(x),), device=device) for _, x in self.inputs]

    def step(self) -> None:
        """All passes forward, those that learn backward in one go."""
        self.net.zero_grad()
        losses = []
        for (learns, x), y in zip(self.inputs, self.targets, strict=True):
            with torch.set_grad_enabled(learns):
                loss = F.cross_entropy(self.net(x), y)
            losses += [loss] * learns
        torch.stack(losses).sum().backward()  # type: ignore[no-untyped-call]


class AvalancheLearner:
    """Avalanche's own strategy and training loop, on the same samples, network and batch sizes."""

    def __init__(self, name: str, replay: int, steps: int = 10) -> None:
        from strategies import avalanche

        self.module, self.steps, self.number = avalanche, steps, 0
        donor = Learner("finetune", {})
        cfg = avalanche.AvalancheConfig(strategy=name, capacity=CAPACITY, replay=max(replay, 1))
        with avalanche.quiet():
            self.learner = avalanche.make(name, cfg, donor.strategy.env)
        self.batches = [donor.stream.batch(step) for step in range(len(donor.stream))]
        for plugin in self.learner.plugins:
            if hasattr(plugin, "batch_size_mem"):
                plugin.batch_size_mem = replay  # Replay's own constructor recalls as many samples as come
        self.experience(CAPACITY)  # fills the memory

    def experience(self, samples: int) -> None:
        """Learn so many samples in mini-batches."""
        some = [self.batches[(self.number + i) % len(self.batches)] for i in range(samples // BATCH)]
        x, y = (torch.cat([batch[key][0] for batch in some]) for key in ("x", "y"))
        with self.module.quiet():
            self.learner.train(self.module.experience(x, y, self.number), num_workers=0, drop_last=False)
        self.number += 1

    def step(self) -> None:
        """`steps` mini-batches of one experience; a step here is so many."""
        self.experience(self.steps * BATCH)
