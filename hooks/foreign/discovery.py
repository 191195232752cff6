"""How often each module of a model runs in one forward: counted in a dry run, printed as a table.

`describe` is the first thing to ask of an unknown looped model; what it returns holds a schedule that
`hooks.foreign.watching` accepts. A module that runs inside a looped one is numbered by the loop that it runs in, and
where it runs several times there, by its call in that loop too. A dry run leaves no trace: no gradients, random state
and buffers as before.

    found = describe(model, tokens)              # prints: module, calls per forward, shapes
    with watch(model, "core.*.hook_out@-1", schedule=found.schedule) as rec:
        model(tokens)
"""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from hooks.foreign import payload
from hooks.foreign.schedules import Discovered, Numbering
from hooks.sites import LoopAxes

COMPILED = ("the module is compiled (torch.compile), and compiled code does not call Python hooks reliably: watch and "
            "call the original module, which shares its weights with the compiled one (compiled._orig_mod).")


HOOKING = threading.RLock()
"""Held while hooks are placed: torch gives two hooks that are placed at once one number, and forgets one of them."""


@dataclass(frozen=True)
class Calls:
    """One row: a module, its class, its calls in one forward, the shapes of what its first call took and gave.

    Of several tensors the first is the hidden state, which is the site ``hook_in`` or ``hook_out``; the others have the
    names by which they are sites too: ``.1`` of ``attn`` is ``attn.hook_out.1``.
    """

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

    Of a TransformerLens bridge the rows are its hook points. Modules that were not called are left out. Raises
    ValueError for a module that is compiled or scripted.
    """
    found = discover(module, args, kwargs)
    print(found)
    return found


def discover(module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *,
             call: Callable[[], Any] | None = None) -> Description:
    """`describe` without the printing. ``call`` runs the module in another way than ``module(*args, **kwargs)``."""
    run, removers = _DryRun(), []

    def took(path: str, _: nn.Module, args: Any, kwargs: Any = None) -> None:
        if _DRY.run is run:  # (torch leaves kwargs out in threads that it hands a hook which is being removed)
            if path not in run.shapes:
                run.shapes[path] = [_shape({**dict(enumerate(args)), **kwargs}), ""]
            run.began(path)

    def gave(path: str, _: nn.Module, __: Any, output: Any) -> None:
        if _DRY.run is run:
            run.shapes[path][1] = run.shapes[path][1] or _shape(output)
            run.ended(path)

    found, _ = modules_of(module)
    try:
        with HOOKING:
            for path, part in found.items():
                removers.append(part.register_forward_pre_hook(partial(took, path), with_kwargs=True))
                removers.append(part.register_forward_hook(partial(gave, path), prepend=True, always_call=True))
        with _leaving_no_trace(module, run):
            if call is None:
                module(*_copied(args), **_copied(dict(kwargs or {})))
            else:
                call()
    finally:
        for remover in removers:
            remover.remove()
    rows = tuple(Calls(path, type(found[path]).__name__, len(chains), *run.shapes[path])
                 for path, chains in run.chains.items())
    return Description(rows, Discovered(tuple((row.path, row.calls) for row in rows), run.numberings()))


def modules_of(module: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Everything inside that can be watched, by path: modules with a forward, or a bridge's hook points.

    Also the other paths of modules that stand in several places: {path: the first path}. Raises ValueError for modules
    whose calls Python cannot see (compiled, scripted).
    """
    found, again = _walked(module)
    for part in found:
        if part._compiled_call_impl is not None or "_orig_mod" in part._modules:
            raise ValueError(COMPILED)
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError("the module is scripted or traced (torch.jit), and its calls cannot be seen from Python: "
                             "watch the module it was made from.")
    if is_bridge(module):
        points: Any = module.hook_dict
        return dict(points), {}
    modules = {path: part for part, path in found.items() if type(part).forward is not nn.Module.forward}
    return modules, _aliases(list(found.values()), again, modules) if again else {}


def is_bridge(module: nn.Module) -> bool:
    """Has ``module`` TransformerLens' hook points? (Told without importing TransformerLens.)"""
    return isinstance(getattr(type(module), "hook_dict", None), property) or isinstance(
        module.__dict__.get("hook_dict"), dict)


def is_dry() -> bool:
    """Is this thread in a dry run, which no watch should see?"""
    return _DRY.run is not None


def unseen(module: nn.Module) -> AbstractContextManager[None]:
    """Inside it, no watch sees what this thread runs, and runs change neither buffers nor torch's random state."""
    return _leaving_no_trace(module, _DryRun())


# ------------------------------------------------------------------------ private


def _walked(module: nn.Module) -> tuple[dict[nn.Module, str], list[tuple[str, str]]]:
    """The first path of every module, and (other path, first path) of those met again.

    In the order of ``module.named_modules()``, only faster: it shows beside a small model's forward.
    """
    found: dict[nn.Module, str] = {}
    again: list[tuple[str, str]] = []
    waiting = [("", module)]
    while waiting:
        path, part = waiting.pop()
        if part in found:
            again.append((path, found[part]))
        else:
            found[part] = path
            prefix = f"{path}." if path else ""
            waiting += [(prefix + name, inner) for name, inner in reversed(part._modules.items()) if inner is not None]
    return found, again


def _aliases(paths: list[str], again: list[tuple[str, str]], wanted: Collection[str]) -> dict[str, str]:
    """Where a module is met again, it and all that is inside it have further paths."""
    found: dict[str, str] = {}
    for other, path in again:
        inner = [name for name in (*paths, *found) if name.startswith(f"{path}.")]
        found.update({other + name[len(path):]: found.get(name, name) for name in (path, *inner)})
    return {other: path for other, path in found.items() if path in wanted}


class _Dry(threading.local):
    """The dry run that this thread is in."""

    run: _DryRun | None = None


_DRY = _Dry()


class _DryRun:
    """What was called inside what."""

    def __init__(self) -> None:
        self.shapes: dict[str, list[str]] = {}
        self.chains: dict[str, list[tuple[tuple[str, int], ...]]] = {}  # of each call, the calls around it: (path, nth)
        self.around: list[tuple[str, int]] = []

    def began(self, path: str) -> None:
        chains = self.chains.setdefault(path, [])
        chains.append(tuple(self.around))
        self.around.append((path, len(chains) - 1))

    def ended(self, path: str) -> None:
        while self.around.pop()[0] != path:  # what ended in an error
            pass

    def numberings(self) -> tuple[tuple[str, Numbering], ...]:
        """Of each module: the loops of what it always runs in, and its calls in one of those where they are several."""
        found: dict[str, Numbering] = {}
        several: set[str] = set()
        for path, chains in self.chains.items():  # in order of first call, so that what is around comes first
            shared = set.intersection(*({name for name, _ in chain} for chain in chains)) - {path, ""}
            parent = next((name for name, _ in reversed(chains[0]) if name in shared), None)
            calls = max(Counter(dict(chain)[parent] for chain in chains).values()) if parent else len(chains)
            by = parent if parent in several else found[parent].by if parent else None
            outer = found[by].axes if by else ()
            if calls > 1:
                several.add(path)
            found[path] = Numbering(_lettered([*(n for _, n in outer), *([calls] if calls > 1 else [])]), by)
        return tuple(found.items())


def _lettered(counts: list[int]) -> LoopAxes:
    return tuple(("" if len(counts) == 1 else ascii_lowercase[8 + i], n) for i, n in enumerate(counts))


@contextmanager
def _leaving_no_trace(module: nn.Module, run: _DryRun) -> Iterator[None]:
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    before, _DRY.run = _DRY.run, run
    try:
        with random_state_kept(), torch.no_grad():
            yield
    finally:
        _DRY.run = before
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
    """The shape of the hidden state, then those of the other elements by name."""
    where = payload.find(value)
    if where is None:
        return "no tensor"
    state = payload.get(value, where)
    others = [f".{name} {list(part.shape)}" for name, part in payload.tensors(value) if part is not state]
    return ", ".join([str(list(state.shape)), *others])
