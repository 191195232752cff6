"""Edited runs, and the same runs by hand, that the tests of edits share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hooks import HookedLoopMDM
from hooks.edits import Edit

POST = "blocks.2.hook_resid_post"
N = 5


def run(model: HookedLoopMDM, tokens: Tensor, *edits: Edit, n_loops: int = N) -> Tensor:
    return model.run_with_hooks(tokens, n_loops, fwd_hooks=edits)


def state_after(model: HookedLoopMDM, tokens: Tensor, *loops: list[int]) -> Tensor:
    """The logits when each loop runs the listed layers, by hand."""
    embedded = model.embed_tokens(tokens)
    rotary = model.rotary(tokens.shape[1])
    x = model.head(embedded)
    for layers in loops:
        for layer in layers:
            x = model.blocks[layer](x, rotary, None)
    return model.tail(x)


def unedited(model: HookedLoopMDM, tokens: Tensor, n_loops: int) -> Tensor:
    return state_after(model, tokens, *[[1, 2]] * n_loops)


def failing(activation: Tensor, *, hook: Any) -> None:
    raise KeyError("stop")
