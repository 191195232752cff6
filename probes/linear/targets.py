"""What a linear probe is to answer: classes or values, for one target or several, as columns of numbers and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Classes:
    """Classes of one target (``n_targets`` None: labels [point]) or of several (labels [point, target]).

    Two classes have one column per target, the score of the second; more have one per class.
    """

    values: np.ndarray
    n_targets: int | None

    @staticmethod
    def of(y: np.ndarray) -> Classes:
        return Classes(np.unique(y), y.shape[1] if y.ndim == 2 else None)

    @property
    def per_target(self) -> int:
        """Columns per target."""
        return len(self.values) if len(self.values) > 2 else 1

    def columns(self, y: np.ndarray) -> Float[np.ndarray, "point column"]:
        """1 where the column's class is the answer, otherwise 0."""
        index = np.searchsorted(self.values, y.reshape(len(y), -1))
        wanted = index[..., None] == (np.arange(self.per_target) if self.per_target > 1 else [1])
        return wanted.reshape(len(y), -1).astype(np.float64)

    def scores(self, columns: Float[Tensor, "*any column"]) -> Tensor:
        """[…] of two classes, […, class] of more; with a target axis first where labels have one."""
        parts = columns.unflatten(-1, (-1, self.per_target))
        parts = parts[..., 0] if self.per_target == 1 else parts
        return parts if self.n_targets is not None else parts.squeeze(columns.ndim - 1)

    def chosen(self, columns: Float[Tensor, "*any column"]) -> Tensor:
        """The index of the class with the largest score, […] or […, target]."""
        scores = self.scores(columns)
        return (scores > 0).long() if self.per_target == 1 else scores.argmax(-1)

    def probabilities(self, columns: Float[Tensor, "*any column"]) -> Tensor:
        """Of classes, from log-odds […, class]; with several targets […, target(, class)], of the second of two."""
        scores = self.scores(columns)
        if self.per_target > 1:
            return scores.softmax(-1)
        yes = scores.sigmoid()
        if self.n_targets is not None:
            return yes
        return torch.stack([1 - yes, yes], -1)[..., :len(self.values)]

    def quality(self, columns: Float[Tensor, "site point column"], wanted: Float[Tensor, "point column"],
                ) -> Float[Tensor, "site"]:
        """Accuracy, over points and targets."""
        right = self.chosen(columns) == self.chosen(wanted - 0.5)
        return right.double().flatten(1).mean(1)


@dataclass(frozen=True)
class Values:
    """Real numbers, one per point (``n_targets`` None) or one per point and target."""

    n_targets: int | None

    @staticmethod
    def of(y: np.ndarray) -> Values:
        return Values(y.shape[1] if y.ndim == 2 else None)

    def columns(self, y: np.ndarray) -> Float[np.ndarray, "point column"]:
        """The values."""
        return np.array(y.reshape(len(y), -1), dtype=np.float64)

    def scores(self, columns: Float[Tensor, "*any column"]) -> Tensor:
        """[…], or […, target] where there are several."""
        return columns if self.n_targets is not None else columns[..., 0]

    chosen = scores

    def quality(self, columns: Float[Tensor, "site point column"], wanted: Float[Tensor, "point column"],
                ) -> Float[Tensor, "site"]:
        """Minus the mean square error in units of the target's variance, over points and targets."""
        spread = wanted.double().var(0, correction=0).clamp_min(torch.finfo(torch.double).tiny)
        return -((columns.double() - wanted.double()).square() / spread).mean((1, 2))
