"""What an analysis asks of a looped model. Probes, studies and explorer know this page and no class of models.

`hooks.HookedLoopMDM` meets it natively; `hooks.adopt` makes any looped ``nn.Module`` meet it. States are always
[batch, pos, d_model], whatever the layout of the model's own tensors. A **depth** is a layer of the unrolled network.

    state, context = model.enter(inputs, n_loops=8)
    for depth in range(context.topology.depth):
        state = model.apply(depth, state, context)
    logits = model.read(state, context)                   # what model(inputs, 8) answers

What a model cannot give raises `Unavailable`, which names it and says how to get it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooks.edits import Edit
from hooks.hook_points import HookFunction
from hooks.recording import Cut, Recording, Reducer
from hooks.sites import SitePattern, SiteSpace
from hooks.topology import Topology

Inputs = Any
"""What the model's forward takes: tokens [batch, pos], or a tuple or mapping of what it takes by place or by name.
Padded sequences are a mapping of ``input_ids`` and ``attention_mask``: padding is never scored."""

State = Float[Tensor, "batch pos d_model"]
Logits = Float[Tensor, "batch pos vocab"]
Levels = Float[Tensor, "batch"] | float | None
"""A noise level t in (0, 1] for all examples or for each; read only by models that are conditioned on it."""

HookList = Sequence[tuple[SitePattern, HookFunction] | Edit]
"""[(site or glob or predicate, function)], as TransformerLens' ``fwd_hooks``, and edits of `hooks.edits`."""

Kind = Literal["resid_pre", "resid_post", "attn_out", "mlp_out"]
"""A place in a layer: the state before it and after it, and what attention and MLP add to the state."""


class Unavailable(ValueError):
    """Something that this model cannot give; the message names it and says how to get it, if it can be had."""


@runtime_checkable
class Context(Protocol):
    """What layers need in one run besides the state: positions, masks, conditioning, injected input. Opaque."""

    @property
    def topology(self) -> Topology:
        """The layout of the run, with its number of loops."""

    def rows(self, index: Int[Tensor, "row"]) -> Context:
        """The context of some of the examples, in this order; an example may be taken several times."""


class Forward(NamedTuple):
    """One forward: the state that enters each depth, with the last one after the last layer, and the answer."""

    states: tuple[State, ...]
    logits: Logits
    context: Context


class LoopedModel(ABC):
    """A looped model as analyses see it."""

    # ---- what it is

    @property
    @abstractmethod
    def name(self) -> str:
        """What people call it."""

    @property
    @abstractmethod
    def module(self) -> nn.Module:
        """The network whose weights these are."""

    @property
    @abstractmethod
    def max_loops(self) -> int:
        """How many loops it runs unless told otherwise (the S_max of a LoopMDM)."""

    @property
    @abstractmethod
    def mask_token_id(self) -> int | None:
        """The token that stands for "to be predicted", or None where there is none or it is not known."""

    @abstractmethod
    def topology(self, n_loops: int | None = None) -> Topology:
        """Layers, loops and unrolled depth. ValueError for a number of loops that the model cannot run."""

    @abstractmethod
    def site_space(self, n_loops: int | None = None) -> SiteSpace:
        """Every site that can be named in a run of ``n_loops`` loops."""

    @abstractmethod
    def site(self, depth: int, kind: Kind = "resid_post", *, n_loops: int | None = None) -> str:
        """The site of a place at an unrolled depth. Raises `Unavailable` where the model has none."""

    @abstractmethod
    def attention(self, depth: int, *, n_loops: int | None = None) -> str:
        """The site of the attention pattern [batch, head, query, key] of a layer. Raises `Unavailable`."""

    # ---- running, recording, editing

    @abstractmethod
    def __call__(self, inputs: Inputs, n_loops: int | None = None, *, t: Levels = None) -> Logits:
        """The model's answer."""

    @abstractmethod
    def run_with_cache(self, inputs: Inputs, n_loops: int | None = None, *, names_filter: SitePattern = None,
                       t: Levels = None, reduce: Reducer | None = None, pos_slice: Cut | None = None,
                       batch_slice: Cut | None = None, only: Literal["masked", "visible"] | None = None,
                       dtype: torch.dtype | None = None, device: torch.device | str | None = None,
                       loss_fn: Callable[[Tensor], Tensor] | None = None) -> tuple[Logits, Recording]:
        """One forward; returns the answer and a recording of the sites that ``names_filter`` names."""

    @abstractmethod
    def run_with_hooks(self, inputs: Inputs, n_loops: int | None = None, *, fwd_hooks: HookList = (),
                       bwd_hooks: HookList = (), t: Levels = None) -> Logits:
        """One forward with hooks and edits in force; returns the answer."""

    @abstractmethod
    def hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = (), *,
              n_loops: int | None = None) -> AbstractContextManager[Any]:
        """Hooks and edits in force for the forwards of a ``with`` block."""

    @abstractmethod
    def exclusive(self) -> AbstractContextManager[None]:
        """Hold the model: forwards of other threads wait."""

    # ---- running by hand

    @abstractmethod
    def enter(self, inputs: Inputs, n_loops: int | None = None, *, t: Levels = None) -> tuple[State, Context]:
        """The state before the first layer, and the context of a run of ``n_loops`` loops."""

    @abstractmethod
    def apply(self, depth: int, state: State, context: Context) -> State:
        """The layer at ``depth`` as it acts at its loop, on any state. The batch is that of ``context``."""

    @abstractmethod
    def read(self, state: State, context: Context) -> Logits:
        """Final norm and unembedding: the logit lens of a state."""

    def walk(self, state: State, context: Context, start: int = 0, stop: int | None = None) -> State:
        """`apply` at each depth from ``start`` up to but without ``stop`` (by default the end)."""
        for depth in range(start, context.topology.depth if stop is None else stop):
            state = self.apply(depth, state, context)
        return state

    def resume(self, depth: int, state: State, context: Context) -> Logits:
        """The answer when ``state`` enters the layer at ``depth`` and the run goes on to its end."""
        return self.read(self.walk(state, context, depth), context)

    def coda(self, state: State, context: Context) -> Logits:
        """The answer when looping stops at ``state``: the tail, then `read` (the coda lens of 2507.02199)."""
        return self.resume(context.topology.depth - context.topology.n_tail, state, context)

    def run(self, inputs: Inputs, n_loops: int | None = None, *, t: Levels = None) -> Forward:
        """One forward with the state before and after every layer."""
        state, context = self.enter(inputs, n_loops, t=t)
        states = [state]
        for depth in range(context.topology.depth):
            states.append(self.apply(depth, states[-1], context))
        return Forward(tuple(states), self.read(states[-1], context), context)

    # ---- what its answers are about

    @abstractmethod
    def scored(self, inputs: Inputs) -> Bool[Tensor, "batch pos"]:
        """Positions that have an answer: masked ones of a masked model, those with a next token of a causal one."""

    @abstractmethod
    def targets(self, inputs: Inputs) -> Int[Tensor, "batch pos"] | None:
        """The answers that the inputs themselves hold (next tokens; −1 where none), or None: give clean tokens."""

    def decode(self, ids: Int[Tensor, "pos"]) -> list[str]:
        """What each token is called."""
        return [str(int(i)) for i in ids]

    # ---- inputs, which only a model knows how to cut

    def real_positions(self, inputs: Inputs) -> Bool[Tensor, "batch pos"] | None:
        """Positions that are no padding, or None where there is none: the ``attention_mask`` of a mapping."""
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        return mask != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def batch_axis(self, inputs: Inputs) -> int:
        """Which axis of the inputs counts examples."""
        return 0

    def batch_size(self, inputs: Inputs) -> int:
        """How many examples there are."""
        axis = self.batch_axis(inputs)
        return next(part.shape[axis] for part in tensors_of(inputs) if part.ndim > axis)

    def select(self, inputs: Inputs, index: Int[Tensor, "row"]) -> Inputs:
        """The inputs of some of the examples, in this order; an example may be taken several times."""
        axis, n = self.batch_axis(inputs), self.batch_size(inputs)
        return _mapped(inputs, lambda part: part.index_select(axis, index.to(part.device))
                       if part.ndim > axis and part.shape[axis] == n else part)


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """The tensors of inputs, in order. ValueError if there are none."""
    if isinstance(inputs, Tensor):
        return [inputs]
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    if not (found := [part for part in parts if isinstance(part, Tensor)]):
        raise ValueError(f"inputs must be a tensor, or a tuple or mapping that holds some, not "
                         f"{type(inputs).__name__}: lists and arrays become tensors by torch.as_tensor.")
    return found


def _mapped(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    def of(part: Any) -> Any:
        return change(part) if isinstance(part, Tensor) else part

    if isinstance(inputs, Mapping):
        return {key: of(value) for key, value in inputs.items()}
    return type(inputs)(of(part) for part in inputs) if isinstance(inputs, (tuple, list)) else of(inputs)
