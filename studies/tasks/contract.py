"""What every task offers: data from a seed, latents with ground truth, exact scores.

A task is a frozen dataclass of its difficulty. It makes sequences of tokens of which some
positions are **given** (always visible) and the rest **free** (masked in training), and it
knows the variables behind them (**latents**), which probes look for.

    task = load_task({"name": "automaton", "rule": 30, "width": 12, "rows": 8})
    batch = task.sample(32, seed=0)
    batch.tokens, batch.free                       # [example, pos]
    task.latents(batch.tokens)["cell"].values      # [example, pos], −1 where undefined
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Examples of a task: the clean tokens, and which positions may be masked."""

    tokens: Int[Tensor, "example pos"]
    free: Bool[Tensor, "example pos"]


@dataclass(frozen=True)
class Latent:
    """A ground-truth variable with a class per position (−1 where it is undefined)."""

    values: Int[Tensor, "example pos"]
    n_classes: int
    description: str


@dataclass(frozen=True)
class Task(ABC):
    """The contract. Subclasses add their difficulty as fields."""

    name: ClassVar[str]
    region_name: ClassVar[str]   # what a region is: "row", "hop", "round"

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of tokens, the mask included."""

    @property
    @abstractmethod
    def seq_len(self) -> int:
        """Positions per example."""

    @property
    def mask_token_id(self) -> int:
        return self.vocab_size - 1

    @abstractmethod
    def sample(self, n: int, seed: int, split: str = "train") -> Batch:
        """``n`` examples, the same for the same seed and split ("train" or "test"; disjoint)."""

    @property
    def has_curriculum(self) -> bool:
        """Whether `curriculum` has easier examples than `sample`."""
        return False

    def curriculum(self, n: int, seed: int, grown: float) -> Batch:
        """``n`` training examples, from the easiest at ``grown`` 0 to those of `sample` at 1.

        They have the task's tokens and positions; what an easier example does not use is blank. Raises ValueError for
        a task that has no curriculum.
        """
        raise ValueError(f"task {self.name!r} has no curriculum: train it with curriculum='none'.")

    @abstractmethod
    def latents(self, tokens: Int[Tensor, "example pos"],
                free: Bool[Tensor, "example pos"] | None = None) -> Mapping[str, Latent]:
        """Every latent of clean examples; the first one is the task's main one.

        Latents that depend on which positions are given (a puzzle's clues) are there only when ``free`` is.
        """

    @abstractmethod
    def regions(self) -> Int[Tensor, "pos"]:
        """A region number per position, in the order in which a solver would fill them."""

    @abstractmethod
    def decode(self, tokens: Int[Tensor, "pos"]) -> str:
        """One example as people read it."""

    @abstractmethod
    def encode(self, text: str) -> Int[Tensor, "pos"]:
        """The inverse of `decode`. Raises ValueError for what is not an example."""

    @abstractmethod
    def model_defaults(self) -> dict[str, Any]:
        """The LoopMDMConfig fields that suit this task at the size trained here."""

    def token_names(self) -> list[str]:
        """What each token id is called, the mask last by default."""
        return [str(i) for i in range(self.vocab_size - 1)] + ["■"]

    def position_names(self) -> list[str]:
        """What each position is called."""
        return [str(i) for i in range(self.seq_len)]

    @property
    def grid_shape(self) -> tuple[int, int]:
        """(rows, columns) in which the sequence is drawn; by default a line."""
        return 1, self.seq_len

    def score(self, predicted: Int[Tensor, "example pos"], batch: Batch) -> dict[str, Tensor]:
        """Per example: ``cells``, the share of free positions that are right, and ``exact``, all of them."""
        right = (predicted == batch.tokens) | ~batch.free
        cells = ((predicted == batch.tokens) & batch.free).sum(1) / batch.free.sum(1).clamp_min(1)
        return {"cells": cells, "exact": right.all(1).float()}

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known - {"name"}):
            raise ValueError(f"task {cls.name!r} has no fields {unknown}; it has {sorted(known)}.")
        return cls(**{key: tuple(value) if isinstance(value, list) else value   # JSON has no tuples
                      for key, value in values.items() if key != "name"})
