"""How often each module of a model runs in one forward: counted in a dry run, printed as a table.

`describe` is the first thing to ask of an unknown looped model; what it returns holds a schedule that
`hooks.foreign.watching` accepts. A dry run leaves no trace: no gradients, random state and buffers as before.

    found = describe(model, tokens)              # prints: module, calls per forward, shapes
    with watch(model, "core.*.hook_out@-1", schedule=found.schedule) as rec:
        model(tokens)
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from hooks.foreign import payload
from hooks.foreign.schedules import Discovered


@dataclass(frozen=True)
class Calls:
    """One row: a module, its class, its calls in one forward, the shape of what its first call took and gave."""

    path: str
    kind: str
    calls: int
    took: str
    gave: str


@dataclass(frozen=True)
class Description:
    """What one forward called, in order of first call; ``print`` it, or hand its ``schedule`` to watch."""

    rows: tuple[Calls, ...]
    schedule: Discovered

    def __str__(self) -> str:
        table = [("module", "class", "calls", "in", "out"),
                 *((row.path or "(the whole)", row.kind, str(row.calls), row.took, row.gave) for row in self.rows)]
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        return "\n".join("  ".join(cell.rjust(w) if i == 2 else cell.ljust(w)
                                   for i, (cell, w) in enumerate(zip(line, widths, strict=True))).rstrip()
                         for line in table)


def describe(module: nn.Module, *args: Any, **kwargs: Any) -> Description:
    """Run ``module(*args, **kwargs)`` once, print how often each of its modules was called, and return the table.

    Of a TransformerLens bridge the rows are its hook points. Modules that were not called are left out.
    """
    found = discover(module, args, kwargs)
    print(found)
    return found


def discover(module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *,
             run: Callable[[], Any] | None = None) -> Description:
    """`describe` without the printing. ``run`` runs the module in another way than ``module(*args, **kwargs)``."""
    seen: dict[str, list[Any]] = {}
    removers: list[Any] = []

    def took(path: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        seen.setdefault(path, [0, _shape({**dict(enumerate(args)), **kwargs}), ""])

    def gave(path: str, _: nn.Module, __: Any, output: Any) -> None:
        row = seen[path]
        row[0] += 1
        row[2] = row[2] or _shape(output)

    found = modules_of(module)
    try:
        for path, part in found.items():
            removers.append(part.register_forward_pre_hook(partial(took, path), with_kwargs=True))
            removers.append(part.register_forward_hook(partial(gave, path), prepend=True))
        with _leaving_no_trace(module):
            if run is None:
                module(*_copied(args), **_copied(dict(kwargs or {})))
            else:
                run()
    finally:
        for remover in removers:
            remover.remove()
    rows = tuple(Calls(path, type(found[path]).__name__, *row) for path, row in seen.items())
    return Description(rows, Discovered(tuple((row.path, row.calls) for row in rows)))


def modules_of(module: nn.Module) -> dict[str, nn.Module]:
    """Everything inside that can be watched, by path: modules with a forward, or a bridge's hook points."""
    if is_bridge(module):
        points: Any = module.hook_dict
        return dict(points)
    return {path: part for path, part in walk(module) if type(part).forward is not nn.Module.forward}


def walk(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """``module.named_modules()`` in the same order, only faster: it shows beside a small model's forward."""
    found: dict[nn.Module, str] = {}
    waiting = [("", module)]
    while waiting:
        path, part = waiting.pop()
        if part not in found:
            found[part] = path
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, inner) for name, inner in reversed(part._modules.items()) if inner is not None]
    return [(path, part) for part, path in found.items()]


def is_bridge(module: nn.Module) -> bool:
    """Has ``module`` TransformerLens' hook points? (Told without importing TransformerLens.)"""
    return isinstance(getattr(type(module), "hook_dict", None), property) or isinstance(
        module.__dict__.get("hook_dict"), dict)


def is_dry() -> bool:
    """Is this thread in a dry run, which no watch should see?"""
    return getattr(_DRY, "on", False)


# ------------------------------------------------------------------------ private

_DRY = threading.local()


@contextmanager
def _leaving_no_trace(module: nn.Module) -> Iterator[None]:
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    before, _DRY.on = is_dry(), True
    try:
        with random_state_kept(), torch.no_grad():
            yield
    finally:
        _DRY.on = before
        with torch.no_grad():
            for buffer, value in buffers:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def random_state_kept(seed: int | None = None) -> Iterator[None]:
    """torch's random state, of the CPU and of CUDA where it is in use, is afterwards what it was; ``seed`` sets it."""
    state = random_state()
    try:
        if seed is not None:
            torch.manual_seed(seed)
        yield
    finally:
        set_random_state(state)


def random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def _copied(value: Any) -> Any:
    """Inputs for a run that must not change them: caches, generators and tensors are copied."""
    def leaf(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part.detach().clone()
        if isinstance(part, torch.Generator):
            return part.clone_state()
        return part if callable(part) else copy.deepcopy(part)

    return _pytree.tree_map(leaf, value)


def _shape(value: Any) -> str:
    where = payload.find(value)
    return "no tensor" if where is None else str(list(payload.get(value, where).shape))
