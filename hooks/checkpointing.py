"""Edits under gradient checkpointing: the backward pass runs a part of the model again, and must edit it again.

``torch.utils.checkpoint`` keeps no activations of a part of a model and calls it a second time in the backward
pass, at its own time: by then the clock of a looped model shows another loop, hooks may have been removed, and
others placed. `guard_recomputation` brings the second run under the conditions of the first, or raises:

    if may_be_checkpointed():
        guard_recomputation("blocks.1.hook_resid_post@3", lambda: entry in point.entries)
    recomputing()                             # in the second run: True

The parts are those around the caller on the stack, of either kind (``use_reentrant`` or not), nested ones included.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Any

import torch

REMEDY = "Call backward inside the block that holds the hooks, or switch checkpointing off."


def may_be_checkpointed() -> bool:
    """Could a part of the model be checkpointed here? Cheap, and False in an ordinary forward with gradients."""
    if "torch.utils.checkpoint" not in sys.modules:
        return False
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def guard_recomputation(what: str, in_force: Callable[[], bool], *, remedy: str = REMEDY,
                        around: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
    """Let every checkpointed part around the caller be run again within ``around()``, and only while ``in_force()``.

    Otherwise its second run raises RuntimeError, which names ``what`` edited the first, and the ``remedy``.
    """
    for part, name in _parts(sys._getframe(1)):
        setattr(part, name, _guarded(getattr(part, name), what, in_force, remedy, around))


def recomputing() -> bool:
    """Is the caller inside the second run of a checkpointed part?"""
    if torch._C._current_graph_task_id() == -1 or "torch.utils.checkpoint" not in sys.modules:
        return False
    checkpoint = sys.modules["torch.utils.checkpoint"]
    reentrant = checkpoint.CheckpointFunction.backward.__code__
    return any(frame.f_code is reentrant or
               (frame.f_code.co_name == "unpack_hook" and frame.f_code.co_filename == checkpoint.__file__)
               for frame in _stack(sys._getframe(1)))


# ------------------------------------------------------------------------ private


def _guarded(run_again: Callable[..., Any], what: str, in_force: Callable[[], bool], remedy: str,
             around: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    def guarded(*args: Any) -> Any:
        if not in_force():
            raise RuntimeError(f"the backward pass runs a part of the model again (torch.utils.checkpoint) that was "
                               f"edited in the forward pass ({what}), without the edit: its gradients would be those "
                               f"of another run. {remedy}")
        with around():
            return run_again(*args)

    return guarded


def _parts(frame: FrameType) -> Iterator[tuple[Any, str]]:
    """What torch will call in the backward pass for each checkpointed part on the stack: an object and its attribute.

    torch has no public way to ask; the names are those of torch 2.13.
    """
    checkpoint = sys.modules["torch.utils.checkpoint"]
    reentrant, other = checkpoint.CheckpointFunction.forward.__code__, inspect.unwrap(checkpoint.checkpoint).__code__
    for outer in _stack(frame):
        if outer.f_code is reentrant:
            yield outer.f_locals["ctx"], "run_function"
        elif outer.f_code is other and (generator := outer.f_locals.get("gen")) is not None:
            yield generator.gi_frame.f_locals["new_frame"], "recompute_fn"


def _stack(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
