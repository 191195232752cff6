"""Mean τ between the loops after the first, computed as the stage test does and in other ways.

    rows = measure(ZOO, CODECS, settings)                     # a row per subject and choice: {"value": …, "each": […]}

Subjects are looped models of the zoo, run for as many loops as their answers need, and two blocks whose programme is
known: a choice is harmless where it leaves AAAA near 1, ABCD near 0 and the models where they were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

from hooks import LoopedModel
from probes.cycles import own_loops
from probes.exchange import Trajectory, exchange
from studies.questions.stage_test.measure import needed_loops
from studies.questions.stage_test.subjects import Examples, codec_subjects, task_examples
from studies.zoo import load

MODELS = {"automaton": ("automaton-loop", "automaton-loop-s1", "automaton-loop-s2"),
          "sudoku 6×6": ("sudoku-loop-6x6", "sudoku-loop-6x6-s1", "sudoku-loop-6x6-s2"),
          "arithmetic": ("arithmetic-loop",)}
"""Entries of the zoo by the name in the table."""
SIZES = (8, 16, 32, 64)
"""Numbers of examples."""
DECILES = 10

CHOICES: Mapping[str, str] = {
    "as the test has it": "t = 0.9, a clock per role, KL",
    "a clock per position": "each position has its own mean and scale",
    "a clock per decile of confidence": "positions are grouped by how sure the model is after one loop",
    "all masked": "t = 1: position and progress go together",
    "random masks": "t between 0 and 1 for each example",
    "changed answers": "share of most probable answers that differ, instead of KL",
    "content of another example": "what is exchanged belongs to another example",
    **{f"{n} examples": "three draws of examples" for n in SIZES}}
"""What is varied, one at a time."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    examples: int = 48
    n_loops: int = 4           # where the subject does not need another number
    draws: int = 3             # of examples, where their number is varied
    seed: int = 0


def measure(zoo: Path, codecs: Path, sizes: Sizes, *, progress: bool = True) -> list[dict[str, Any]]:
    """A row per subject and choice: the mean over models and draws, and each of them."""
    subjects: dict[str, list[tuple[LoopedModel, Callable[[int, int, str], Examples]]]] = {}
    for name, entries in MODELS.items():
        subjects[name] = [(entry.model, _task(entry.task)) for path in entries if (zoo / path).is_dir()
                          for entry in [load(zoo / path)]]
    for subject in codec_subjects(codecs):
        subjects[f"codec {subject.name}"] = [(subject.load()[0], _whole(subject.examples))]
    needed = {name: needed_loops([model for model, _ in models], models[0][1](sizes.examples, sizes.seed + 1, ""))
              for name, models in subjects.items() if name in MODELS and models}   # as the stage test has it
    rows = []
    with tqdm(total=len(CHOICES) * sum(map(len, subjects.values())), desc="choices", disable=not progress) as bar:
        for name, models in subjects.items():
            for choice in CHOICES:
                each = []
                for model, drawn in models:
                    each += tau_under(choice, model, drawn, replace(sizes, n_loops=needed.get(name, sizes.n_loops)))
                    bar.update()
                if each:
                    rows.append({"subject": name, "choice": choice, "value": float(np.mean(each)),
                                 "each": [round(value, 6) for value in each]})
    return rows


def tau_under(choice: str, model: LoopedModel, drawn: Callable[[int, int, str], Examples], sizes: Sizes) -> list[float]:
    """Mean τ under one choice, for each draw of examples."""
    if choice.endswith(" examples"):
        n = int(choice.split()[0])
        return [_mean_tau(model, drawn(n, sizes.seed + draw, choice), sizes, choice) for draw in range(sizes.draws)]
    return [_mean_tau(model, drawn(sizes.examples, sizes.seed, choice), sizes, choice)]


def _mean_tau(model: LoopedModel, drawn: Examples, sizes: Sizes, choice: str) -> float:
    options: dict[str, Any] = {}
    if choice == "a clock per position":
        options["clock"] = "position"
    if choice == "a clock per decile of confidence":
        options["roles"] = deciles(model, drawn, sizes.n_loops)
    if choice == "content of another example":
        options["shuffle"] = sizes.seed
    found = exchange(model, drawn.inputs, own_loops(model.topology(sizes.n_loops)), scored=drawn.scored, t=drawn.t,
                     **options)
    kl, work = (found.changed, found.changed_by_skip) if choice == "changed answers" else (found.kl, found.work)
    kl, work = kl.mean("example").values[1:, 1:], np.maximum(work.mean("example").values[1:], np.finfo(float).tiny)
    value = np.clip(1 - kl / work[:, None], -1, 1)
    others = ~np.eye(len(work), dtype=bool)
    weight = np.broadcast_to(work[:, None], value.shape)
    return float((value * weight)[others].sum() / weight[others].sum())


@torch.no_grad()
def deciles(model: LoopedModel, drawn: Examples, n_loops: int) -> Int[Tensor, "batch pos"]:
    """Positions that are not scored are one group; the others are grouped by their confidence after one loop.

    A model whose answers have other positions than its states has one group.
    """
    run = Trajectory.of(model, drawn.inputs, own_loops(model.topology(n_loops)), t=drawn.t)
    after = run.states[1]
    sure = run.go_on(run.n_places, after, torch.arange(run.n_examples)).softmax(-1).amax(-1)
    if sure.shape != after.shape[:2]:
        return torch.zeros(after.shape[:2], dtype=torch.long)
    edges = torch.quantile(sure[drawn.scored], torch.linspace(0, 1, DECILES + 1)[1:-1])
    return torch.where(drawn.scored, 1 + torch.bucketize(sure, edges), 0)


def _task(task: Any) -> Callable[[int, int, str], Examples]:
    def drawn(n: int, seed: int, choice: str) -> Examples:
        if choice == "random masks":
            levels = (torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 0.9 + 0.1).tolist()
            return task_examples(task, 1, seed, levels)
        return task_examples(task, n, seed, (1.0 if choice == "all masked" else 0.9,))
    return drawn


def _whole(examples: Callable[..., Examples]) -> Callable[[int, int, str], Examples]:
    """A codec's examples: no masks, and any number of them."""
    def drawn(n: int, seed: int, choice: str) -> Examples:
        found = examples(n, seed, (1.0,))
        return Examples(found.inputs[:n], found.targets[:n], found.scored[:n], None)
    return drawn
