"""Any Avalanche strategy behind our interface, one instance per run: `avalanche:Replay`, `avalanche:EWC`, ...

Source: Carta et al. 2023, "Avalanche: A PyTorch Library for Deep Continual Learning" (version 0.6).
Departures: strategies that learn mini-batch by mini-batch get each batch as an experience of its own, with a reservoir in
place of buffers that count experiences. All others (LwF, EWC, GEM, ...) are defined on whole tasks: a task's batches are
collected and learned in one epoch at its boundary, so they need a stream that announces boundaries, and between
boundaries their accuracy stands still. Avalanche draws from global generators: each run has its own saved state of them.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import pickle
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD

from cl_sim.config import at_least
from cl_sim.encoders.classifier import Classifier
from cl_sim.errors import BadConfig, UnknownName
from cl_sim.optim import trainable
from cl_sim.rng import derive
from cl_sim.strategy import Env, Strategy
from cl_sim.types import Batch, Logs

BY_BATCH = ("Naive", "Replay", "ER_ACE", "SCR", "MIR", "DER", "StreamingLDA")
BY_TASK = ("LwF", "EWC", "SynapticIntelligence", "MAS", "GEM", "AGEM", "GDumb", "CWRStar")
ALIASES = {"SLDA": "StreamingLDA", "SI": "SynapticIntelligence"}
REFUSED = {
    "GSS_greedy": "its plug-in rebuilds batches with the wrong image axes",
    "CoPE": "its loss joins class prototypes and features of different sizes unless the network ends in its own head",
    "BiC": "it assigns to experience.dataset, which is read-only",
    "LFL": "it asks the network for get_features, which only some of Avalanche's own models have",
}
USUAL: dict[str, dict[str, Any]] = {  # arguments without a default of their own
    "LwF": {"alpha": 1.0, "temperature": 2.0},
    "EWC": {"ewc_lambda": 100.0},
    "SynapticIntelligence": {"si_lambda": 1.0},
    "GEM": {"patterns_per_exp": 256, "memory_strength": 0.5},
    "AGEM": {"patterns_per_exp": 256, "sample_size": 10},
    "MIR": {"subsample": 50},
    "SCR": {"augmentations": nn.Identity()},
    "CWRStar": {"cwr_layer_name": "head"},
}


@dataclass(frozen=True, kw_only=True)
class AvalancheConfig:
    """Settings of an Avalanche strategy."""

    strategy: str = "Naive"  # the class's name in avalanche.training
    lr: float = 0.1  # learning rate of SGD
    capacity: int = 1000  # samples kept per run, where the strategy has a memory
    replay: int = 10  # samples recalled per step, where the strategy recalls
    options: tuple[str, ...] = ()  # further arguments of the class, e.g. ewc_lambda=0.4

    def __post_init__(self) -> None:
        at_least(self, lr=0, capacity=1, replay=1)


class Avalanche(Strategy):
    """One Avalanche strategy per run, fed with our batches."""

    Config, tasks = AvalancheConfig, frozenset({"classify"})

    def __init__(self, cfg: AvalancheConfig, env: Env) -> None:
        super().__init__(cfg, env)
        self.name = resolve(cfg.strategy)
        self.by_task = self.name not in BY_BATCH
        if self.by_task and not env.announces:
            raise BadConfig(
                f"avalanche:{self.name} learns task by task, but this stream announces no boundaries; use --set "
                f"stream.announces=true, or one of {', '.join(BY_BATCH)}"
            )
        self.generators = [fresh_generators(seed) for seed in env.seeds]
        self.learners: list[Any] = []
        for run, seed in enumerate(env.seeds):
            with self.randomness(run), quiet():
                torch.manual_seed(derive(seed, "net 0"))
                self.learners.append(make(self.name, cfg, env))
        self.models = nn.ModuleList(learner.model for learner in self.learners)
        self.collected: list[Batch] = []
        self.learned = 0  # experiences so far

    @property
    def steady(self) -> bool:
        """Never: Avalanche reads the host."""
        return False

    def observe(self, new: Batch) -> Logs:
        """Learn the batch, or keep it until the task ends."""
        if self.by_task:
            self.collected.append({key: new[key].clone() for key in ("x", "y")})
            return {}
        return self.learn(new["x"], new["y"])

    def boundary(self) -> None:
        """Learn the task that has ended, if that is how the strategy learns."""
        if self.by_task and self.collected:
            x, y = (torch.cat([batch[key] for batch in self.collected], 1) for key in ("x", "y"))
            self.collected = []
            self.learn(x, y)

    def learn(self, x: Tensor, y: Tensor) -> Logs:
        """Hand every run its samples as one experience.    Shapes: x [R, N, ...], y [R, N]."""
        losses = []
        for run, learner in enumerate(self.learners):
            with self.randomness(run), quiet():
                _renew_iterators(learner)
                learner.train(experience(x[run], y[run], self.learned), num_workers=0, drop_last=False)
                _drop_iterators(learner)
            losses.append(torch.as_tensor(learner.loss).detach().float())
        self.learned += 1
        return {"loss": torch.stack(losses).to(self.env.device)}

    def predict(self, batch: Batch) -> Tensor:
        """Class scores.    Shapes: -> [R, B, C]."""
        scores = []
        for learner, x in zip(self.learners, batch["x"], strict=True):
            learner.model.eval()
            answer = learner.model(x)
            scores.append(learner.predict(answer) if self.name == "StreamingLDA" else answer)
        return torch.stack(scores)

    @contextmanager
    def randomness(self, run: int) -> Iterator[None]:
        """Within, the global generators are the run's own; afterwards they are as before."""
        outside = read_generators()
        write_generators(self.generators[run])
        try:
            yield
        finally:
            self.generators[run] = read_generators()
            write_generators(outside)

    def get_extra_state(self) -> dict[str, Any]:
        """The pickled learners and generators, as bytes."""
        content = pickle.dumps((self.learners, self.generators, self.collected, self.learned))
        return {"pickle": torch.frombuffer(bytearray(content), dtype=torch.uint8)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Put back what get_extra_state returned."""
        content = pickle.loads(state["pickle"].cpu().numpy().tobytes())
        self.learners, self.generators, self.collected, self.learned = content
        self.models = nn.ModuleList(learner.model for learner in self.learners)


def resolve(name: str) -> str:
    """The class's name.    Raises: UnknownName; BadConfig for one that is known not to work."""
    name = ALIASES.get(name, name)
    if name in REFUSED:
        raise BadConfig(f"avalanche:{name} does not work with avalanche 0.6.0: {REFUSED[name]}")
    known = [*BY_BATCH, *BY_TASK]
    if name not in known:
        raise UnknownName("Avalanche strategy", name, known, "cl-sim describe avalanche")
    return name


def make(name: str, cfg: AvalancheConfig, env: Env) -> Any:
    """One Avalanche strategy with a fresh network and optimiser, silent."""
    from avalanche import training

    cls = getattr(training, name)
    own = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs", "args"}
    offered = {
        "train_mb_size": 10,
        "train_epochs": 1,
        "eval_mb_size": 100,
        "device": env.device,
        "evaluator": None,
        "mem_size": cfg.capacity,
        "batch_size_mem": cfg.replay,
        "criterion": nn.CrossEntropyLoss(),
        **network(name, cfg, env),
        **USUAL.get(name, {}),
        **options(name, cfg, own),
    }
    learner = cls(**{key: value for key, value in offered.items() if key in own})
    _count_samples_not_experiences(learner, cfg)
    return learner


def network(name: str, cfg: AvalancheConfig, env: Env) -> dict[str, Any]:
    """The network and optimiser arguments; two strategies want more than a classifier."""
    encoder = env.encoder().to(env.device)
    if name == "StreamingLDA":
        return {"slda_model": encoder.eval(), "input_size": encoder.dim, "num_classes": env.classes}
    if name == "SCR":
        from avalanche.models import SCRModel

        head = nn.Sequential(nn.Linear(encoder.dim, encoder.dim), nn.ReLU(), nn.Linear(encoder.dim, 128))
        model: nn.Module = SCRModel(feature_extractor=encoder, projection=head).to(env.device)
    else:
        model = Classifier(encoder, env.classes).to(env.device)
    return {"model": model, "optimizer": SGD(trainable(model), lr=cfg.lr)}


def options(name: str, cfg: AvalancheConfig, own: set[str]) -> dict[str, Any]:
    """The user's own arguments.    Raises: BadConfig for one that the class does not have."""
    given = {}
    for option in cfg.options:
        key, equals, text = option.partition("=")
        if not equals or key not in own:
            near = difflib.get_close_matches(key, own, n=1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise BadConfig(f"avalanche:{name} has no argument '{key}'; {hint}It has {', '.join(sorted(own))}")
        try:
            given[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[key] = text
    return given


def _count_samples_not_experiences(learner: Any, cfg: AvalancheConfig) -> None:
    """A replay buffer that shares its room among experiences would share it among batches: use a reservoir."""
    from avalanche.training.plugins import ReplayPlugin
    from avalanche.training.storage_policy import ExperienceBalancedBuffer, ReservoirSamplingBuffer

    for plugin in learner.plugins:
        if isinstance(plugin, ReplayPlugin) and isinstance(plugin.storage_policy, ExperienceBalancedBuffer):
            plugin.storage_policy = ReservoirSamplingBuffer(max_size=cfg.capacity)


class Reshuffled:
    """An endless iterator over a data loader that can be saved: every item is the first of a new shuffle."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __next__(self) -> Any:
        return next(iter(self.loader))


def _drop_iterators(learner: Any) -> None:
    """Replace the generators over data loaders that plug-ins keep, because they cannot be saved."""
    for holder in (learner, *learner.plugins):
        for key, value in list(vars(holder).items()):
            if isinstance(value, GeneratorType):
                loader = value.gi_frame.f_locals.get("loader") if value.gi_frame else None
                setattr(holder, key, None if loader is None else Reshuffled(loader))


def _renew_iterators(learner: Any) -> None:
    """A-GEM's plug-in makes its iterator at the end of a task; make it at the start of the next one instead."""
    for plugin in learner.plugins:
        if getattr(plugin, "buffer_dataloader", None) is not None:
            plugin.buffer_dliter = iter(plugin.buffer_dataloader)


@contextmanager
def quiet() -> Iterator[None]:
    """Avalanche 0.6 calls its own deprecated functions at every step."""
    with warnings.catch_warnings(record=True):  # its decorator overrides every filter; what is recorded is not shown
        warnings.simplefilter("ignore")
        yield


def experience(x: Tensor, y: Tensor, number: int) -> Any:
    """Samples as an Avalanche experience.    Shapes: x [N, ...], y [N]."""
    from avalanche.benchmarks import CLStream
    from avalanche.benchmarks.scenarios.dataset_scenario import DatasetExperience
    from avalanche.benchmarks.utils import _make_taskaware_tensor_classification_dataset

    made = DatasetExperience(dataset=_make_taskaware_tensor_classification_dataset(x, y, task_labels=0))
    made.classes_in_this_experience = sorted(set(y.tolist()))
    made.task_labels = [0]
    made.task_label = 0
    played = next(iter(CLStream("train", [made])))
    played.current_experience = number
    return played


Generators = tuple[Tensor, Any, Any]


def fresh_generators(seed: int) -> Generators:
    """The state of torch's, numpy's and Python's global generators for one run."""
    torch_state = torch.Generator().manual_seed(derive(seed, "avalanche")).get_state()
    numpy_state = np.random.RandomState(derive(seed, "avalanche numpy") % 2**32).get_state()
    return torch_state, numpy_state, random.Random(derive(seed, "avalanche python")).getstate()


def read_generators() -> Generators:
    """The present state of the global generators."""
    return torch.get_rng_state(), np.random.get_state(), random.getstate()


def write_generators(state: Generators) -> None:
    """Set the global generators."""
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])
