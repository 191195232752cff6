"""Tasks with known latent variables; each file is one, `contract` is what they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from studies.tasks.arithmetic import Arithmetic
from studies.tasks.automaton import Automaton
from studies.tasks.contract import Batch, Latent, Task
from studies.tasks.pointer import Pointer
from studies.tasks.stories import Stories
from studies.tasks.sudoku import Sudoku
from studies.tasks.text import Text

TASKS: dict[str, type[Task]] = {task.name: task for task in (Automaton, Pointer, Sudoku, Arithmetic, Stories, Text)}


def load_task(values: Mapping[str, Any]) -> Task:
    """A task from ``{"name": …, difficulty …}``, as cards store it. ValueError for an unknown one."""
    name = values.get("name")
    if name not in TASKS:
        raise ValueError(f"no task is called {name!r}; there are {', '.join(TASKS)}.")
    return TASKS[str(name)].from_dict(values)


__all__ = ["TASKS", "Arithmetic", "Automaton", "Batch", "Latent", "Pointer", "Stories", "Sudoku", "Task", "Text",
           "load_task"]
