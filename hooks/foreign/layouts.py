"""Which axis is which in the states of a watched module: declared, known of torch's own modules, checked by shapes.

Hooks, edits, reducers and recordings see states as [batch, pos, d_model], whatever the module itself works on. A
`StateLayout` turns its states to that and back; `Layouts` finds the layout of each site.

    layout = StateLayout(("pos", "batch", "d_model"))
    layout.axes                                       # ("batch", "pos", "d_model")
    seen = layout.canonical(state)                    # a view [batch, pos, d_model] of [pos, batch, d_model]
    layout.original(seen)                             # [pos, batch, d_model] again

torch's modules say with ``batch_first`` what they work on (also `nn.TransformerEncoderLayer`, whose attention says it).
A module of one's own that holds some with positions first may work on either: where the shape does not tell, its axes
are unknown, and what needs them (a position, a batch, a mean over positions) is refused until they are declared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor, nn

from hooks.foreign.places import Place
from hooks.recording import known_axes
from hooks.sites import glob

Axes = tuple[str, ...]

Declared = Axes | Mapping[str, Axes] | None
"""The axes of a module's hidden states, such as ("pos", "batch", "d_model"), or {site pattern: axes}."""

BATCH_FIRST: Axes = ("batch", "pos", "d_model")
POSITIONS_FIRST: Axes = ("pos", "batch", "d_model")
WEIGHTS: Axes = ("batch", "head", "query", "key")


@dataclass(frozen=True)
class StateLayout:
    """The axes that a module's own states have. ``batch`` and ``pos`` go first in what analyses see.

    States without a batch get one of size 1, and states [batch, d_model] one position. Without ``known``, the axes are
    mere numbers, and states are seen as they are.
    """

    own: Axes
    known: bool = True

    @cached_property
    def axes(self) -> Axes:
        """The axes as analyses see them."""
        names = (*self._added, *self.own)
        first = tuple(name for name in ("batch", "pos") if name in names)
        return first + tuple(name for name in names if name not in first)

    @cached_property
    def is_canonical(self) -> bool:
        """Is there nothing to turn?"""
        return self.axes == self.own

    def canonical(self, state: Tensor) -> Tensor:
        """A view of a module's own state, as analyses see it."""
        return state.reshape((1,) * len(self._added) + state.shape).permute(self._order)

    def original(self, state: Tensor) -> Tensor:
        """What `canonical` was given, of what it gave."""
        back = state.permute(tuple(self._order.index(i) for i in range(len(self._order))))
        return back.reshape(back.shape[len(self._added):])

    @cached_property
    def _added(self) -> Axes:
        if not self.known:
            return ()
        names = self.own if "batch" in self.own else ("batch", *self.own)
        if set(names) == {"batch", "d_model"}:
            names = ("pos", *names)
        return names[:len(names) - len(self.own)]

    @cached_property
    def _order(self) -> tuple[int, ...]:
        return tuple((*self._added, *self.own).index(name) for name in self.axes)


_STATE = StateLayout(BATCH_FIRST)


def declared_layout(axes: Iterable[str]) -> StateLayout:
    """The layout that a user names. ValueError for names that are no axes."""
    names = tuple(axes)
    if isinstance(axes, str) or len({*names}) != len(names) or not names:
        raise ValueError(f"axes are different names, one for each axis, such as ('pos', 'batch', 'd_model'), not "
                         f"{axes!r}.")
    return StateLayout(names)


class Layouts:
    """The layouts of the sites of one watched module. ValueError for a declaration that makes no sense."""

    def __init__(self, modules: Mapping[str, nn.Module], declared: Declared):
        self.modules = modules
        by_site = declared if isinstance(declared, Mapping) else {}
        self.everywhere = None if declared is None or isinstance(declared, Mapping) else declared_layout(declared)
        self.declared = [(pattern, declared_layout(axes)) for pattern, axes in by_site.items()]
        self.said = _said_by(modules)
        self.plain = declared is None and not self.said  # nothing says anything
        self.sizes: tuple[int, int] | None = None  # (batch, pos) of this forward's input
        self.fits, self.misfit = False, ""         # a state with as many axes as are declared; one with others
        said = self._said("") if "" in modules else None
        if self.everywhere and said and said[0].own != self.everywhere.own:
            raise ValueError(f"axes={self.everywhere.own} is declared, and {said[1]} {' × '.join(said[0].own)}: leave "
                             "axes out.")
        self.outer = said[0] if said else self.everywhere

    def begin(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
        """A forward begins with these inputs; has the size of its batch or sequence changed?"""
        sizes = self._input(args, kwargs)
        changed, self.sizes = sizes != self.sizes, sizes
        return changed

    def of(self, name: str, place: Place, state: Tensor) -> StateLayout:
        """The layout of a state at a site; axes that are not known are called ``axis_0``, ``axis_1``.

        Raises ValueError if what is declared or known of the module contradicts the shapes of state and input.
        """
        n, shape = state.ndim, list(state.shape)
        if n == 3 and self.plain and not (self.sizes and self._in_doubt(place.path, shape)) and not known_axes(name):
            return _STATE
        for pattern, layout in self.declared:
            if glob(pattern)(name):
                if len(layout.own) != n:
                    raise ValueError(f"{name} has shape {shape}, and axes= declares {' × '.join(layout.own)} for it.")
                return self._checked(layout, name, shape, f"axes= declares for {pattern!r}")
        if known := known_axes(name):
            return StateLayout(known) if len(known) == n else _unknown(n)
        if place.element is not None and (weights := self._weights(place, n)):
            return weights
        if said := self._said(place.path, place):
            layout, what = said
            if len(layout.own) == n:
                return self._checked(layout, name, shape, what)
            unbatched = tuple(axis for axis in layout.own if axis != "batch")
            return StateLayout(unbatched) if len(unbatched) == n and place.element is None else _unknown(n, batch=False)
        if self.everywhere is not None and len(self.everywhere.own) == n:
            self.fits = True
            return self._checked(self.everywhere, name, shape, "axes= declares")
        self.misfit = self.misfit or f"{name} has shape {shape}"
        if n != 3:
            return _unknown(n, batch=place.element is None)
        return _unknown(3, batch=False) if self._in_doubt(place.path, shape) else _STATE

    def refuse_misfit(self) -> None:
        """RuntimeError if what is declared for all states fits none of them."""
        if self.everywhere is not None and not self.fits and self.misfit:
            raise RuntimeError(f"axes={self.everywhere.own} declares {len(self.everywhere.own)} axes, and no state "
                               f"that was recorded or edited has as many: {self.misfit}.")

    # ------------------------------------------------------------------ private

    def _said(self, path: str, place: Place | None = None) -> tuple[StateLayout, str] | None:
        """What the nearest module around says of its states, and who says it."""
        if not self.said:
            return None
        around = path
        while around not in self.said:
            if not around:
                return None
            around = around.rpartition(".")[0]
        module, first = self.modules[around], self.said[around]
        what = f"{type(module).__name__}{f' at {around!r}' if around else ''} works on"
        if first is None:
            return StateLayout(("batch", "d_model")), what
        what = f"{what} (batch_first={first})"
        if isinstance(module, nn.RNNBase) and place and place.path == around and _is_memory(place):
            return StateLayout(("layer", "batch", "d_model")), what
        return StateLayout(BATCH_FIRST if first else POSITIONS_FIRST), what

    def _weights(self, place: Place, n: int) -> StateLayout | None:
        """Attention weights beside the hidden state that an attention module returns."""
        module = self.modules[place.path]
        if isinstance(module, nn.MultiheadAttention) and place.kind == "out" and place.element == "1":
            return StateLayout(WEIGHTS if n == 4 else ("batch", "query", "key") if n == 3 else ("query", "key"))
        return StateLayout(WEIGHTS) if n == 4 and is_attention(place) and "." not in (place.element or "") else None

    def _in_doubt(self, path: str, shape: list[int]) -> bool:
        """May a state that nothing is said of have its positions first?"""
        if self.sizes and self.sizes[0] != self.sizes[1] and {*shape[:2]} == {*self.sizes}:
            return tuple(shape[:2]) != self.sizes
        return any(said is False and (not path or inner.startswith(f"{path}.")) for inner, said in self.said.items())

    def _checked(self, layout: StateLayout, name: str, shape: list[int], what: str) -> StateLayout:
        if self.sizes and "batch" in layout.own and "pos" in layout.own:
            found = shape[layout.own.index("batch")], shape[layout.own.index("pos")]
            if found == self.sizes[::-1] and found[0] != found[1]:
                raise ValueError(f"{name} has shape {shape}, and {what} {' × '.join(layout.own)}; but the input has "
                                 f"batch {self.sizes[0]} and pos {self.sizes[1]}. One of the two is the other way "
                                 "round: mend the module (batch_first), or what it is given, or declare axes by site.")
        return layout

    def _input(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> tuple[int, int] | None:
        """(batch, pos) of the watched module's input: of tokens, or of states whose axes are declared or known.

        Tokens are [batch, pos], or in the order that is declared for states.
        """
        tensors = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
        order = [name for name in (self.everywhere.own if self.everywhere else ()) if name in ("batch", "pos")]
        for part in tensors:
            if part.ndim == 2 and not part.is_floating_point() and not part.is_complex():
                return (part.shape[1], part.shape[0]) if order == ["pos", "batch"] else (part.shape[0], part.shape[1])
        layout = self.outer
        if layout and tensors and tensors[0].ndim == len(layout.own) and {"batch", "pos"} <= {*layout.own}:
            return tensors[0].shape[layout.own.index("batch")], tensors[0].shape[layout.own.index("pos")]
        return None


def is_attention(place: Place) -> bool:
    """Is this an element of what an attention module returns, or one that is called attention?"""
    words = f"{place.path.rpartition('.')[2]} {type(place.module).__name__} {place.element}".lower()
    return "attn" in words or "attention" in words


def _said_by(modules: Mapping[str, nn.Module]) -> dict[str, bool | None]:
    """Of each module that says so: does it take batches first? None for cells, which take no positions."""
    said: dict[str, bool | None] = {}
    layers: list[tuple[str, str]] = []
    for path, part in modules.items():
        if isinstance(first := part.__dict__.get("batch_first"), bool):
            said[path] = first
        elif (inner := _inner(type(part))) is not None:  # type: ignore[arg-type]  # classes are hashable
            layers.append((path, inner))
    for path, inner in layers:
        attention = f"{path}.{inner}".strip(".")
        if not inner or attention in said:
            said[path] = said[attention] if inner else None
    return said


@lru_cache(maxsize=4096)
def _inner(kind: type[nn.Module]) -> str | None:
    """Where the module is, in one of this kind, that says it; "" for cells, None for modules that say nothing."""
    if issubclass(kind, nn.RNNCellBase):
        return ""
    if issubclass(kind, (nn.TransformerEncoder, nn.TransformerDecoder)):
        return "layers.0.self_attn"
    return "self_attn" if issubclass(kind, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)) else None


def _unknown(n: int, batch: bool = True) -> StateLayout:
    """Axes of which at most the first is known."""
    return StateLayout(tuple("batch" if batch and not i else f"axis_{i}" for i in range(n)), known=False)


def _is_memory(place: Place) -> bool:
    """Is this the state of an RNN between steps (h, or h and c), which it takes and returns beside its outputs?"""
    first = (place.element or "").partition(".")[0]
    return first == "1" or first == "hx"


__all__ = ["BATCH_FIRST", "POSITIONS_FIRST", "Axes", "Declared", "Layouts", "StateLayout", "declared_layout",
           "is_attention"]
