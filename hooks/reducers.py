"""Reducers: what to keep of an activation, decided inside the hook, so that memory does not grow.

Each is given to ``run_with_cache(reduce=...)`` (or to `hooks.recording.Recorder`) and is called
with the detached activation as it passes; only its result is held. They know axes by name,
so that a recording of reductions is as well labelled as one of activations.

    _, rec = model.run_with_cache(tokens, n_loops=24, reduce=Mean("pos"), names_filter="blocks.*.hook_resid_post")
    rec.to_xarray("blocks.2.hook_resid_post")                  # loop × batch × d_model
    model.run_with_cache(tokens, reduce=Entropy(), names_filter="blocks.*.attn.hook_pattern")    # batch × head × query
    largest = Reduced(lambda x, site: x.amax((1, 2)), dims=("batch",), definition="largest coordinate")
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from hooks.recording import axes_of
from hooks.sites import split

Axes = tuple[str, ...]


class Reduction(ABC):
    """A reducer that names its axes. Subclasses implement `reduced` and `dims`.

    ``definition`` and ``units`` label what is kept. ``forward_only`` marks reducers that compare a loop
    with the one before it, and so make no sense for gradients, which visit loops in reverse.
    """

    definition = ""
    units = "1"
    forward_only = False

    def __call__(self, activation: Tensor, site: str, axes: Axes | None = None) -> Tensor:
        """``axes`` are those of ``activation``; by default what the site's name implies."""
        axes = axes_of(site) if axes is None else axes
        if activation.ndim != len(axes):
            raise ValueError(f"{type(self).__name__} knows {site} as {' × '.join(axes)}, but it has shape "
                             f"{tuple(activation.shape)}: reduce it with Reduced(fn, dims=...).")
        return self.reduced(activation, site, axes)

    @abstractmethod
    def dims(self, axes: Axes) -> Axes:
        """Axis names of the result, given those of the activation."""

    @abstractmethod
    def reduced(self, activation: Tensor, site: str, axes: Axes) -> Tensor:
        """What to keep of the activation, with the axes that `dims` names."""

    def reset(self) -> None:  # noqa: B027 — most reducers have nothing to forget
        """Forget earlier firings; called at the beginning and the end of a run."""


class _OverAxis(Reduction):
    """One that takes a named axis away."""

    def __init__(self, over: str):
        self.over = over

    def dims(self, axes: Axes) -> Axes:
        return tuple(axis for axis in axes if axis != self.over)

    def _index(self, axes: Axes, site: str) -> int:
        if self.over not in axes:
            raise ValueError(f"{type(self).__name__}({self.over!r}) has nothing to reduce at {site}, whose axes are "
                             f"{', '.join(axes)}: choose one of these, or other sites.")
        return axes.index(self.over)


class Mean(_OverAxis):
    """The mean over one axis; with ``where``, boolean [batch, pos], over the positions where it is true.

    A row of ``where`` without any position gives NaN.
    """

    def __init__(self, over: str = "pos", where: Tensor | None = None):
        super().__init__(over)
        if where is not None and (over != "pos" or where.dtype != torch.bool or where.ndim != 2):
            raise ValueError("where chooses positions: it needs over='pos' and a boolean [batch, pos] tensor.")
        self.where = where
        self.definition = f"mean over {over}" + (" where chosen" if where is not None else "")

    def reduced(self, activation: Tensor, site: str, axes: Axes) -> Tensor:
        axis = self._index(axes, site)
        if self.where is None:
            return activation.mean(axis)
        weight = self.where.to(activation).view(*self.where.shape, *(1,) * (activation.ndim - 2))
        return (activation * weight).sum(axis) / weight.sum(1)


class Norm(_OverAxis):
    """The Euclidean norm over one axis."""

    def __init__(self, over: str = "d_model"):
        super().__init__(over)
        self.definition = f"Euclidean norm over {over}"

    def reduced(self, activation: Tensor, site: str, axes: Axes) -> Tensor:
        return activation.norm(dim=self._index(axes, site))


class _AgainstPrevious(_OverAxis):
    """One that compares a loop with the loop before it, which is all that it holds."""

    forward_only = True

    def __init__(self, over: str = "d_model"):
        super().__init__(over)
        self.reset()

    def reset(self) -> None:
        self._previous: dict[str, tuple[tuple[int, ...], Tensor]] = {}

    def reduced(self, activation: Tensor, site: str, axes: Axes) -> Tensor:
        axis = self._index(axes, site)
        name, at = split(site)
        if at is None:
            raise ValueError(f"{type(self).__name__} compares loops, and {site} runs once: name looped sites only, "
                             f"for example with '@*' ('blocks.*.hook_resid_post@*').")
        loop = tuple(int(number) for number in re.findall(r"\d+", at))
        before, previous = self._previous.get(name, ((), activation))
        self._previous[name] = loop, activation.clone()  # the forward may still write into what passed by
        if not before or not _follows(loop, before):
            return activation.select(axis, 0) * torch.nan
        return self.compared(activation, previous, axis)

    @abstractmethod
    def compared(self, now: Tensor, before: Tensor, axis: int) -> Tensor:
        """What became of ``before``, the previous loop, over one axis."""


class CosineToPrevious(_AgainstPrevious):
    """cos(X_k, X_{k−1}) over one axis; NaN in the first loop, and wherever loop k − 1 was not recorded."""

    definition = "cosine to the value at the same site one loop earlier"

    def compared(self, now: Tensor, before: Tensor, axis: int) -> Tensor:
        return torch.cosine_similarity(now, before, dim=axis)


class ChangeFromPrevious(_AgainstPrevious):
    """‖X_k − X_{k−1}‖ / ‖X_{k−1}‖ over one axis (2509.23314); NaN as in `CosineToPrevious`."""

    definition = "norm of the change since one loop earlier, relative to the norm there"

    def compared(self, now: Tensor, before: Tensor, axis: int) -> Tensor:
        return (now - before).norm(dim=axis) / before.norm(dim=axis)


class Entropy(_OverAxis):
    """Entropy of attention patterns, −Σ_key A log A per query: the mixing score of 2604.11791 before its mean."""

    definition = "entropy of the attention pattern over keys"
    units = "nat"

    def __init__(self) -> None:
        super().__init__("key")

    def reduced(self, activation: Tensor, site: str, axes: Axes) -> Tensor:
        if "key" not in axes or split(site)[0].endswith("hook_attn_scores"):
            raise ValueError(f"Entropy reads distributions, and {site} holds none: name '**.attn.hook_pattern', or the "
                             "attention weights that a module returns ('**.attn.hook_out.1').")
        return torch.special.entr(activation).sum(self._index(axes, site))


class Histogram(Reduction):
    """Counts of all values in ``bins`` equal bins over [low, high]; values beyond count in the outermost bins."""

    def __init__(self, low: float, high: float, bins: int = 64):
        if not low < high or bins < 1:
            raise ValueError(f"a histogram needs low < high and at least one bin, not {low}, {high}, {bins}.")
        self.low, self.high, self.bins = low, high, bins
        self.definition = f"values in each of {bins} equal bins over [{low}, {high}], outliers in the outermost"
        self.units = "count"

    def dims(self, axes: Axes) -> Axes:
        return ("bin",)

    def reduced(self, activation: Tensor, site: str, axes: Axes) -> Tensor:
        scaled = (activation.flatten().float() - self.low) / (self.high - self.low) * self.bins
        return torch.bincount(scaled.floor().clamp(0, self.bins - 1).long(), minlength=self.bins)


class Reduced(Reduction):
    """A function of your own, ``fn(activation, site)``, with names for the axes of its result."""

    def __init__(self, fn: Callable[[Tensor, str], Tensor], dims: Axes, definition: str = "", units: str = "1"):
        self.fn, self.names = fn, tuple(dims)
        self.definition, self.units = definition or f"{getattr(fn, '__name__', 'function')} of the activation", units

    def __call__(self, activation: Tensor, site: str, axes: Axes | None = None) -> Tensor:
        return self.reduced(activation, site, axes or ())  # whatever its shape: the function knows

    def reduced(self, activation: Tensor, site: str, axes: Axes) -> Tensor:
        value = self.fn(activation, site)
        if isinstance(value, Tensor) and value.ndim != len(self.names):
            raise ValueError(f"the function returned shape {tuple(value.shape)} at {site}, and was said to return "
                             f"{' × '.join(self.names) or 'a scalar'}: mend one of them.")
        return value

    def dims(self, axes: Axes) -> Axes:
        return self.names


def _follows(loop: tuple[int, ...], before: tuple[int, ...]) -> bool:
    """Is ``loop`` the firing right after ``before``? In nested cycles an inner 0 follows the next outer index."""
    if loop[:-1] == before[:-1]:
        return loop[-1] == before[-1] + 1
    return loop[-1] == 0 and _follows(loop[:-1], before[:-1])
