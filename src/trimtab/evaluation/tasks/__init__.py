"""Evaluation tasks by name. A task is a file of this folder whose name does not begin with an underscore."""

from __future__ import annotations

import functools
import importlib
import inspect
from pathlib import Path

from trimtab.core.errors import ConfigError, did_you_mean
from trimtab.evaluation.base import Task


@functools.cache
def task_names() -> tuple[str, ...]:
    """Names of all tasks, read from the folder; nothing is imported."""
    return tuple(sorted(p.stem for p in Path(__file__).parent.glob("*.py") if not p.name.startswith("_")))


def task(name: str, **options: object) -> Task:
    """The task of this name. Raises ConfigError with a suggestion for an unknown name or option."""
    if name not in task_names():
        raise ConfigError(f"unknown task '{name}'. {did_you_mean(name, task_names())}")
    module = importlib.import_module(f"trimtab.evaluation.tasks.{name}")
    cls: type[Task] = getattr(module, module.__all__[0])
    known = tuple(inspect.signature(cls).parameters)
    for option in options:
        if option not in known:
            raise ConfigError(f"task '{name}' has no option '{option}'. {did_you_mean(option, known)}")
    return cls(**options)
