"""What the catalogue's measurements are made on: a model, inputs, and what should be answered.

    setting = Setting(model, noised, tokens, noised == model.mask_token_id, n_loops=4, t=0.9)
    setting.residual.dims                                     # ("depth", "batch", "pos", "d_model")
    setting.first(2).n                                        # the same of fewer examples
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import xarray as xr
from jaxtyping import Bool, Int
from torch import Tensor

from hooks import LoopedModel
from hooks.contract import Forward, Inputs, Levels
from probes import depth_coords, measurement

MOST_CLASSES = 8
"""Answers that linear probes tell apart: the commonest ones."""


@dataclass(frozen=True, eq=False)
class Setting:
    """A model and examples of one kind; what several measurements need is made once."""

    model: LoopedModel
    inputs: Inputs
    targets: Int[Tensor, "batch pos"]
    scored: Bool[Tensor, "batch pos"]
    n_loops: int | None = None                  # None: as many as the model has by default
    t: Levels = None
    twin: LoopedModel | None = None             # compared with, where there is one
    seed: int = 0

    @property
    def n(self) -> int:
        return self.model.batch_size(self.inputs)

    @cached_property
    def run(self) -> Forward:
        """One forward of all examples."""
        with torch.no_grad():
            return self.model.run(self.inputs, self.n_loops, t=self.t)

    @cached_property
    def residual(self) -> xr.DataArray:
        """The state after each layer, [depth, batch, pos, d_model]."""
        return stream(self.run)

    @cached_property
    def line(self) -> xr.DataArray:
        """`residual`, with the looped layers' states on the straight line through those of loops 0 and 1.

        Raises ValueError for fewer than two loops.
        """
        ends = self.run.context.topology.loop_depths()
        if len(ends) < 2:
            raise ValueError("a straight line goes through the states of two loops, and this model runs one.")
        line = self.residual.copy(deep=True)
        for layer in range(len(ends[0])):
            start = self.residual.values[ends[0][layer]]
            step = self.residual.values[ends[1][layer]] - start
            for k, loop in enumerate(ends):
                line.values[loop[layer]] = start + k * step
        return line

    @cached_property
    def labels(self) -> tuple[Int[Tensor, "batch pos"], int]:
        """What linear probes read: the answers at scored positions as classes, the commonest ones, −1 elsewhere."""
        answers = torch.where(self.scored & (self.targets >= 0), self.targets, -1)
        tokens, counts = answers[answers >= 0].unique(return_counts=True)
        common = tokens[counts.argsort(descending=True, stable=True)[:MOST_CLASSES]].sort().values
        labels = torch.full_like(answers, -1)
        for number, token in enumerate(common):
            labels[answers == token] = number
        return labels, len(common)

    @cached_property
    def tokens_of_labels(self) -> Int[Tensor, "class"]:
        """The answer that each class of `labels` stands for."""
        labels, n_classes = self.labels
        return torch.stack([self.targets[labels == number][0] for number in range(n_classes)])

    def first(self, n: int) -> Setting:
        """The setting of the first ``n`` examples, for what takes long."""
        chosen = torch.arange(min(n, self.n))
        t = self.t[chosen] if isinstance(self.t, Tensor) and self.t.ndim else self.t
        return replace(self, inputs=self.model.select(self.inputs, chosen), targets=self.targets[chosen],
                       scored=self.scored[chosen], t=t)


def stream(run: Forward) -> xr.DataArray:
    """The state after each layer of a forward, [depth, batch, pos, d_model]."""
    return measurement(torch.stack(list(run.states[1:])), ("depth", "batch", "pos", "d_model"), units="1",
                       long_name="residual stream", definition="the state after each layer of the unrolled network",
                       source="the model", coords=depth_coords(run.context.topology))
