"""How a looped model is built: its layers in the order in which they run, who sets its loops, where attention is.

An `Architecture` is what `hooks.adopt` needs to know. `known` reads it from the configuration of ALBERT, HRM-Text,
Ouro and Huginn, from a model that `hooks.loopify` loops, and from a TransformerLens bridge; `declared` makes it from
what a user says.

    known(huginn).topology(8).site_at(5, "hook_out")       # 'transformer.core_block.1.hook_out@1'
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from hooks.foreign.discovery import is_bridge
from hooks.foreign.schedules import LOOPIFIED, Cycles, Schedule, albert, hrm_text, huginn, ouro
from hooks.topology import LayerPlace, Topology

Answers = Literal["masked", "next", "any"]
"""Which positions have an answer: masked ones, those with a next token, or all."""

LOOP_NAMES = ("n_loops", "num_loops", "num_steps", "n_steps", "loops", "n_iterations", "n_iter")
"""Keywords of a forward, and attributes of a module, that are taken for its number of loops."""

ATTENTION_NAMES = ("attention.self", "self_attn", "self_attention", "attention", "attn")
"""Where the attention of a layer is looked for, in this order."""


@dataclass(frozen=True)
class Architecture:
    """``head``, ``mid`` and ``tail`` are places in the order in which they run; ``mid`` is one loop.

    ``with_loops(n)`` holds the model at ``n`` loops for a block, and yields keywords for its forward; None if the
    number of loops cannot be changed. ``schedule(n)`` says to `hooks.watch` which modules loop.
    ``attention`` names the pattern's site relative to a layer; ``hooks`` names the site of each kind of place.
    """

    head: tuple[LayerPlace, ...]
    mid: tuple[LayerPlace, ...]
    tail: tuple[LayerPlace, ...]
    n_loops: int
    schedule: Callable[[int], Schedule]
    with_loops: Callable[[int], AbstractContextManager[dict[str, Any]]] | None = None
    attention: str | None = None
    needs_eager: bool = False              # the pattern is there only with attn_implementation="eager"
    answers: Answers = "any"
    hooks: Mapping[str, str] = field(default_factory=lambda: {"resid_pre": "hook_in", "resid_post": "hook_out"})
    carries: bool = True                   # is a layer's state all that later loops get from earlier ones?

    def topology(self, n_loops: int) -> Topology:
        aliases = {f"hook_{kind}": hook for kind, hook in self.hooks.items()}
        if self.attention is not None:
            aliases["attn.hook_pattern"] = self.attention
        return Topology(len(self.head), len(self.mid), len(self.tail), n_loops, (*self.head, *self.mid, *self.tail),
                        tuple(aliases.items()))

    def order(self, module: nn.Module, n_loops: int) -> list[nn.Module]:
        """The layers of a run, one after another."""
        named = {place.name: module.get_submodule(place.name) for place in (*self.head, *self.mid, *self.tail)}
        return [named[place.name] for place in (*self.head, *self.mid * n_loops, *self.tail)]


# -------------------------------------------------------------------- declared


def declared(module: nn.Module, layers: Sequence[str] | None, n_loops: int | str | None,
             cycles: Schedule | Mapping[str, Cycles] | None) -> Architecture:
    """The architecture of a module of one's own. ``layers`` are paths, globs allowed, in the order in which they run.

    Those that ``cycles`` covers are looped, the others run once before or after; without it all are looped.
    ``n_loops`` is their number, or the name of the forward's keyword or the attribute ("core.n_loops") that sets it.
    Raises ValueError that says what is missing or does not fit.
    """
    if not layers:
        raise ValueError(f"which modules of {type(module).__name__} are the layers of its loop? adopt() knows ALBERT, "
                         "HRM-Text, Ouro, Huginn, loopified models and TransformerLens bridges; for others name them "
                         "in the order in which they run, for example layers=['block.0', 'block.1'], n_loops=8. "
                         "hooks.describe(module, inputs) prints how often each module runs.")
    if isinstance(layers, str):
        raise ValueError(f"layers is a list of paths in the order in which they run: layers=[{layers!r}].")
    paths = _expanded(module, layers)
    schedule = cycles if isinstance(cycles, Schedule) or cycles is None else Schedule(cycles)
    looped = [schedule is None or bool(schedule.axes(path)) for path in paths]
    if True not in looped:
        raise ValueError(f"the schedule loops none of the layers {paths}: it should name at least one.")
    first, last = looped.index(True), len(looped) - looped[::-1].index(True)
    if not all(looped[first:last]):
        raise ValueError(f"the looped layers must follow one another, and {paths[first:last]} holds some that the "
                         "schedule does not loop: list the layers of the loop one after another.")
    setting, count = _loops_of(module, n_loops, None if schedule is None else schedule.axes(paths[first]))
    mid = paths[first:last]
    repeats = {path: mid.count(path) for path in mid}
    number = {path: i for i, path in enumerate(dict.fromkeys(paths))}

    def place(path: str, index: int, at: str) -> LayerPlace:
        if repeats.get(path, 1) == 1 or not at:
            return LayerPlace(path, number[path], at)
        return LayerPlace(path, number[path], f"k{at}.i{mid[:index].count(path)}")

    def entries(n: int) -> Schedule:
        return Schedule({path: n if count == 1 else {"k": n, "i": count} for path, count in repeats.items()})

    return Architecture(tuple(place(path, 0, "") for path in paths[:first]),
                        tuple(place(path, i, "{k}") for i, path in enumerate(mid)),
                        tuple(place(path, 0, "") for path in paths[last:]), count, entries, setting,
                        answers=_answers(module))


def _expanded(module: nn.Module, layers: Sequence[str]) -> list[str]:
    known = dict(module.named_modules(remove_duplicate=False))
    paths: list[str] = []
    for layer in layers:
        if layer in known and layer:
            paths.append(layer)
            continue
        parts = str(layer).count(".")
        found = [path for path in known if path and path.count(".") == parts and fnmatch.fnmatchcase(path, str(layer))]
        if not found:
            raise ValueError(f"{type(module).__name__} has no module {layer!r}; it has "
                             f"{', '.join(list(known)[1:9]) or 'none inside it'} …: name the modules that are looped.")
        paths += found
    if containers := [path for path in paths if type(known[path]).forward is nn.Module.forward]:
        raise ValueError(f"{containers[0]} is a list of modules and is never called itself: name what is in it, for "
                         f"example '{containers[0]}.*'.")
    return paths


def _loops_of(module: nn.Module, n_loops: int | str | None,
              axes: tuple[tuple[str, int], ...] | None) -> tuple[Any, int]:
    """(what sets the number of loops, or None; the number it runs by default)."""
    if isinstance(n_loops, bool) or not (n_loops is None or isinstance(n_loops, (int, str))):
        raise ValueError(f"n_loops is a number, or the name of what holds it, not {n_loops!r}.")
    number = n_loops if isinstance(n_loops, int) else axes[0][1] if axes else None
    if number is not None and number < 1:
        raise ValueError(f"n_loops must be at least 1, not {number}.")
    if isinstance(n_loops, str):
        setting, held = _named_setting(module, n_loops)
        if number is None and held is None:
            raise ValueError(f"{n_loops!r} has no default: give schedule={{layer: number}} too.")
        return setting, number if number is not None else int(held or 0)
    for name in LOOP_NAMES:
        try:
            setting, held = _named_setting(module, name)
        except ValueError:
            continue
        if number is None and held is None:
            continue
        if held is None or number is None or held == number:
            return setting, number if number is not None else int(held or 0)
    if number is None:
        raise ValueError("how many loops? n_loops= is their number, or the name of the forward's keyword or of the "
                         "attribute that sets it.")
    return None, number


def _named_setting(module: nn.Module, name: str) -> tuple[Any, int | None]:
    parameter = inspect.signature(module.forward).parameters.get(name)
    if parameter is not None:
        default = parameter.default if isinstance(parameter.default, int) else getattr(module, name, None)
        return (lambda n: nullcontext({name: n})), default if isinstance(default, int) else None
    owner, _, attribute = name.rpartition(".")
    holder: Any = module
    for part in filter(None, owner.split(".")):
        holder = getattr(holder, part, None)
    held = getattr(holder, attribute, None)
    if not isinstance(held, int) or isinstance(held, bool):
        raise ValueError(f"{type(module).__name__} has no keyword of its forward and no number called {name!r}.")
    return (lambda n: _attribute(holder, attribute, n)), held


@contextmanager
def _attribute(holder: Any, name: str, value: int) -> Iterator[dict[str, Any]]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield {}
    finally:
        setattr(holder, name, before)


def pattern_element(attention: str) -> str:
    """``"attn"`` and ``"attn.1"`` mean the second thing that the module returns: ``attn.hook_out.1``."""
    if "hook_" in attention:
        return attention
    path, _, last = attention.rpartition(".")
    return f"{path}.hook_out.{last}" if last.isdigit() and path else f"{attention}.hook_out.1"


# ----------------------------------------------------------------------- known


def known(module: nn.Module) -> Architecture | None:
    """What the configuration tells, or None for a model that is not known."""
    if module in LOOPIFIED:
        return _loopified(module)
    if is_bridge(module):
        return _bridge(module)
    config = getattr(module, "config", None)
    reader = _KNOWN.get(getattr(config, "model_type", ""))
    return None if reader is None else reader(module, config)


def _albert(module: nn.Module, config: Any) -> Architecture:
    if config.num_hidden_groups > 1:
        raise ValueError(f"this ALBERT has {config.num_hidden_groups} groups of layers, each looped by itself, and one "
                         "loop is what an analysis takes: use a model of one group.")
    stack = _path_of(module, "albert_layer_groups.0.albert_layers")
    mid = _places([f"{stack}.{i}" for i in range(config.inner_group_num)], "{k}")
    return _with_attention(module, Architecture(
        (), mid, (), config.num_hidden_layers, albert,
        lambda n: _attribute(config, "num_hidden_layers", n), needs_eager=True, answers="masked"))


def _hrm_text(module: nn.Module, config: Any) -> Architecture:
    fast, slow = _path_of(module, "L_module.layers"), _path_of(module, "H_module.layers")
    n = config.num_layers_per_stack
    inner = [LayerPlace(f"{fast}.{i}", i, f"h{{k}}.l{cycle}") for cycle in range(config.L_cycles) for i in range(n)]
    outer = [LayerPlace(f"{slow}.{i}", n + i, "h{k}") for i in range(n)]
    return _with_attention(module, Architecture(
        (), (*inner, *outer), (), config.H_cycles,
        lambda loops: hrm_text(loops, config.L_cycles),
        lambda loops: _attribute(config, "H_cycles", loops), needs_eager=True, answers="next", carries=False))


def _ouro(module: nn.Module, config: Any) -> Architecture:
    stack = _path_of(module, "layers")
    owner: Any = module.get_submodule(stack.rpartition(".")[0])
    mid = _places([f"{stack}.{name}" for name, _ in module.get_submodule(stack).named_children()], "{k}")
    return _with_attention(module, Architecture(
        (), mid, (), owner.total_ut_steps, ouro,
        lambda n: _attribute(owner, "total_ut_steps", n), needs_eager=True, answers="next"))


def _huginn(module: nn.Module, config: Any) -> Architecture:
    root = _path_of(module, "core_block").rpartition(".")[0]
    parts = {part: [f"{root}.{part}.{name}" for name, _ in module.get_submodule(f"{root}.{part}").named_children()]
             for part in ("prelude", "core_block", "coda")}
    start = len(parts["prelude"])
    middle = start + len(parts["core_block"])
    return _with_attention(module, Architecture(
        _places(parts["prelude"], ""), _places(parts["core_block"], "{k}", start),
        _places(parts["coda"], "", middle), config.mean_recurrence,
        huginn, lambda n: nullcontext({"num_steps": n}),
        answers="next"))


def _loopified(module: nn.Module) -> Architecture:
    loops = LOOPIFIED[module]
    paths = [f"{loops.path}.{i}" for i in range(loops.n_layers)]
    last = loops.first + len(loops.block)
    return _with_attention(module, Architecture(
        _places(paths[:loops.first], ""), _places(paths[loops.first:last], "{k}", loops.first),
        _places(paths[last:], "", last), loops.n_loops, lambda n: Schedule(dict.fromkeys(paths[loops.first:last], n)),
        lambda n: _attribute(loops, "_n_loops", n), needs_eager=True, answers=_answers(module)))


def _bridge(bridge: Any) -> Architecture:
    """The blocks of a bridge, once each: an unrolled or unlooped model."""
    if not hasattr(bridge, "blocks"):
        raise ValueError("this bridge has no blocks in a row (it is itself looped): adopt the model it was made from, "
                         "bridge.original_model.")
    paths = [f"blocks.{i}" for i in range(len(bridge.blocks))]
    return Architecture((), _places(paths, ""), (), 1, lambda n: Schedule({}), attention="attn.hook_pattern",
                        answers=_answers(bridge.original_model),
                        hooks={kind: f"hook_{kind}" for kind in ("resid_pre", "resid_post", "attn_out", "mlp_out")})


def _with_attention(module: nn.Module, architecture: Architecture) -> Architecture:
    layer = module.get_submodule(architecture.mid[0].name)
    names = {name for name, _ in layer.named_modules()}
    found = next((name for name in ATTENTION_NAMES if name in names), None)
    return replace(architecture, attention=None if found is None else f"{found}.hook_out.1")


def _answers(module: nn.Module) -> Answers:
    kinds = [type(module).__name__, *(getattr(getattr(module, "config", None), "architectures", None) or ())]
    if any("MaskedLM" in kind for kind in kinds):
        return "masked"
    return "next" if any("CausalLM" in kind or "LMHead" in kind for kind in kinds) else "any"


def _places(paths: Sequence[str], at: str, first: int = 0) -> tuple[LayerPlace, ...]:
    return tuple(LayerPlace(path, first + i, at) for i, path in enumerate(paths))


def _path_of(module: nn.Module, ending: str) -> str:
    for path, _ in module.named_modules():
        if path == ending or path.endswith(f".{ending}"):
            return path
    kind = getattr(module.config, "model_type", "nothing")
    raise ValueError(f"{type(module).__name__} calls itself {kind} and has no {ending!r}: name its layers with "
                     "layers=.")


_KNOWN: dict[str, Callable[[nn.Module, Any], Architecture]] = {
    "albert": _albert, "hrm_text": _hrm_text, "ouro": _ouro, "huginn_raven": _huginn,
}
