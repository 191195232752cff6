"""Examples: a few at a time, each with its own noise level, and in another order.

    for some, some_t, rows in in_chunks(model, noised, t, size=64):
        logits = model(some, n_loops, t=some_t)               # rows: the indices of these examples
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel


def select_examples(model: LoopedModel, inputs: Inputs, t: Levels,
                    chosen: Sequence[int] | Int[Tensor, "row"] | None,
                    ) -> tuple[Inputs, Float[Tensor, "row"] | float | None]:
    """Some of the examples, and their noise levels; None chooses all."""
    if chosen is None:
        return inputs, t
    index = torch.as_tensor(chosen if isinstance(chosen, Tensor) else list(chosen), dtype=torch.long)
    return model.select(inputs, index), t[index.to(t.device)] if isinstance(t, Tensor) and t.ndim else t


def in_chunks(model: LoopedModel, inputs: Inputs, t: Levels, *,
              size: int) -> Iterator[tuple[Inputs, Levels, Int[Tensor, "row"]]]:
    """(inputs, noise levels, indices) of ``size`` examples after ``size`` examples, the last part maybe fewer."""
    for rows in torch.arange(model.batch_size(inputs)).split(size):
        yield *select_examples(model, inputs, t, rows), rows


def derangement(n: int, seed: int) -> Int[Tensor, "example"]:
    """A random order in which no example stands in its own place: a cycle through all of them."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    moved = torch.empty_like(order)
    moved[order] = order.roll(1)
    return moved
