"""The tasks that a method on features can learn, `Classes` and `Items`, with the same methods: it is written once for both.

Each holds a net with a part `encoder`; called as a whole the net answers scores.
"""

from __future__ import annotations

from cl_sim.strategy import Env
from cl_sim.tasks.base import Task, TaskConfig
from cl_sim.tasks.classes import Classes
from cl_sim.tasks.items import Items


def of(cfg: TaskConfig, env: Env) -> Task:
    """The task of the stream.    Raises: BadConfig for settings of the other one."""
    return Classes(cfg, env) if env.task == "classify" else Items(cfg, env)
