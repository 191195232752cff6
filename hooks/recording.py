"""What a run left behind: activations (or reductions of them) held by site.

`Recorder` is the hook function that copies, slices or reduces an activation while the
model runs; `Recording` is the mapping that remains. A recording holds data, never the
model, and never answers "the last loop" by accident: a looped name needs a loop.

    logits, rec = model.run_with_cache(tokens, names_filter="blocks.*.hook_resid_post")
    rec["blocks.2.hook_resid_post@3"]          # [batch, pos, d_model]
    rec.stack("blocks.2.hook_resid_post")      # [loop, batch, pos, d_model]
    rec.residual_stream()                      # xarray: depth × batch × pos × d_model
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooks.sites import LoopAxes, Site, SiteError, SiteSpace
from hooks.topology import Topology

if TYPE_CHECKING:
    import xarray

Reducer = Callable[[Tensor, str], Tensor]
"""A function of (activation, site) that runs inside the hook and returns what to keep; the site says the
loop (``blocks.2.hook_resid_post@3``). One with a method ``dims`` also names its axes: see `hooks.reducers`."""

Cut = slice | Tensor | Sequence[int] | Sequence[bool]
"""Which of an axis to keep: a slice, or indices, or booleans."""

_AXES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("attn.hook_pattern", "attn.hook_attn_scores"), ("batch", "head", "query", "key")),
    **dict.fromkeys((f"attn.hook_{q}" for q in ("q", "k", "v", "z", "rot_q", "rot_k")),
                    ("batch", "pos", "head", "d_head")),
    **dict.fromkeys(("mlp.hook_pre", "mlp.hook_post", "mlp.hook_pre_linear"), ("batch", "pos", "d_mlp")),
    "attn.hook_result": ("batch", "pos", "head", "d_model"),
    "hook_scale": ("batch", "pos", "one"),
}


def axes_of(name: str) -> tuple[str, ...]:
    """Axis names of an unreduced activation: ``axes_of("blocks.0.attn.hook_q")`` ends in ``d_head``."""
    return known_axes(name) or ("batch", "pos", "d_model")


def known_axes(name: str) -> tuple[str, ...] | None:
    """`axes_of` for the names whose axes are not those of a state."""
    parts = name.partition("@")[0].split(".")
    return _AXES.get(".".join(parts[-2:])) or _AXES.get(parts[-1])


def axes_at(hook: Any) -> tuple[str, ...]:
    """Axis names of what a hook function is given: those that the hook itself knows, or what its name implies."""
    return getattr(hook, "axes", None) or axes_of(hook.name)


def positions(tokens: Tensor, mask_token_id: int, only: str, *, real: Tensor | None = None) -> Tensor:
    """The masked or the visible positions of ``tokens``, boolean [batch, pos], among the ``real`` ones if given."""
    if only not in ("masked", "visible"):
        raise ValueError(f"only must be 'masked' or 'visible', not {only!r}.")
    chosen = (tokens == mask_token_id) == (only == "masked")
    return chosen if real is None else chosen & real


class Recorder:
    """The hook that keeps an activation. One instance serves every site of one run.

    ``batch`` and ``pos`` cut their axes before copying (``pos`` cuts the queries of attention patterns, as
    TransformerLens does). A boolean ``pos`` of shape [batch, pos] keeps only the positions where it is true,
    on one axis ``point`` in place of the two, in row-major order. ``reduce`` runs on the detached, cut
    activation, so that what is held may be far smaller than what passed by; ``dtype`` and ``device`` are
    those of the copy.
    """

    def __init__(self, *, reduce: Reducer | None = None, pos: Cut | None = None, batch: Cut | None = None,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        self.reduce, self.dtype, self.device = reduce, dtype, device
        self.pos, self.batch = chooser(pos), chooser(batch)
        self.plain = all(option is None for option in (reduce, pos, batch, dtype, device))
        self.held: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.axes: dict[str, tuple[str, ...]] = {}
        self._shelf = Shelf()
        self._forget_reducer()

    def __call__(self, activation: Tensor, /, *, hook: Any) -> None:
        self.held[hook.site] = activation.detach().clone() if self.plain else self._kept(activation, hook)

    def backward(self, gradient: Tensor, /, *, hook: Any) -> None:
        self.gradients[hook.site] = self._kept(gradient, hook)

    def recording(self, names: Mapping[str, LoopAxes] | SiteSpace, topology: Topology | None = None) -> Recording:
        """What was held so far, as a `Recording` of ``names``; the recorder is empty afterwards."""
        attrs = {key: value for key in ("definition", "units") if (value := getattr(self.reduce, key, None))}

        def made(held: dict[str, Tensor], gradients: Recording | None) -> Recording:
            if not self.plain:  # off the shelf, so that one value does not keep its neighbours alive
                held = {site: value.clone() for site, value in held.items()}
            return Recording(held, names, topology=topology, gradients=gradients, reduced=self.reduce is not None,
                             axes=self.axes, attrs=attrs)

        recording = made(self.held, made(self.gradients, None) if self.gradients else None)
        self.held, self.gradients, self.axes, self._shelf = {}, {}, {}, Shelf()
        self._forget_reducer()
        return recording

    def _forget_reducer(self) -> None:
        if reset := getattr(self.reduce, "reset", None):
            reset()

    def _kept(self, activation: Tensor, hook: Any) -> Tensor:
        value, axes = self._cut(activation.detach(), axes_at(hook), hook.site)
        reduce: Any = self.reduce
        if reduce is not None:
            if dims := getattr(reduce, "dims", None):
                value, axes = reduce(value, hook.site, axes), dims(axes)
            else:
                value, axes = reduce(value, hook.site), ()
            if not isinstance(value, Tensor):
                raise TypeError(f"the reducer returned {type(value).__name__} at {hook.site}; "
                                "it must return a tensor.")
        self.axes[hook.name] = axes
        return self._shelf.put(value.to(device=self.device, dtype=self.dtype))

    def _cut(self, value: Tensor, axes: tuple[str, ...], site: str) -> tuple[Tensor, tuple[str, ...]]:
        pos = self.pos
        if "batch" not in axes and value.ndim and (self.batch is not None or pos is not None):
            raise ValueError(f"{site} has shape {list(value.shape)}, and which of its axes is the batch is not "
                             "known: give watch axes=, or record it whole.")
        if self.batch is not None and axes[:1] == ("batch",):
            value = value[self.batch]
            if isinstance(pos, Tensor) and pos.ndim == 2:
                pos = pos[self.batch]
        axis = next((i for i, name in enumerate(axes) if name in ("pos", "query")), None)
        if pos is None or axis is None or value.ndim != len(axes):
            return value, axes
        if isinstance(pos, slice) or pos.ndim == 1:
            return value[(slice(None),) * axis + (pos,)], axes
        if pos.dtype != torch.bool or pos.shape != (value.shape[0], value.shape[axis]):
            raise ValueError(f"a two-dimensional choice of positions must be boolean and [batch, pos], here "
                             f"{[value.shape[0], value.shape[axis]]}, not {pos.dtype} {list(pos.shape)}.")
        rest = tuple(name for i, name in enumerate(axes) if i not in (0, axis))
        return value.movedim(axis, 1)[pos], ("point", *rest)


def chooser(cut: Cut | None) -> slice | Tensor | None:
    """``cut`` as a slice or a tensor of indices or booleans."""
    if cut is None or isinstance(cut, (slice, Tensor)):
        return cut
    chosen = torch.as_tensor(cut)
    return chosen if chosen.numel() else chosen.long()  # an empty list chooses nothing


class Shelf:
    """Copies of small tensors, side by side in few large blocks.

    Kept one by one between the forward's large temporaries, small results would each pin a hole in the heap
    that no later temporary fits: the process grew by an activation per result although almost nothing
    was held. Values of ``BLOCK`` bytes or more get a tensor of their own.
    """

    BLOCK = 2 ** 20

    def __init__(self) -> None:
        self._blocks: dict[tuple[torch.dtype, torch.device], tuple[Tensor, int]] = {}

    def put(self, value: Tensor) -> Tensor:
        """A copy of ``value``, on the shelf if it is small."""
        size = value.numel()
        if size * value.element_size() >= self.BLOCK:
            return value.clone()
        key = value.dtype, value.device
        block, used = self._blocks.get(key, (value.new_empty(0), 0))
        if used + size > block.numel():
            block, used = value.new_empty(self.BLOCK // value.element_size()), 0
        self._blocks[key] = block, used + size
        return block[used:used + size].view(value.shape).copy_(value)


class Recording(Mapping[str, Tensor]):
    """Activations of one run by site. Keys are full site names, in firing order.

    ``gradients`` is a second recording with the gradients at the same sites, if they were asked for;
    ``axes`` are the axis names of what was cut or reduced, by name, where they are known. ``absent`` are the sites of
    hooks and edits that this run did not reach, where that depends on the data; ``left_out`` says of names that were
    found by a wildcard why they could not be recorded.
    """

    def __init__(self, held: Mapping[str, Tensor], names: Mapping[str, LoopAxes] | SiteSpace, *,
                 topology: Topology | None = None, gradients: Recording | None = None, reduced: bool = False,
                 axes: Mapping[str, tuple[str, ...]] | None = None, attrs: Mapping[str, str] | None = None):
        self.space = names if isinstance(names, SiteSpace) else SiteSpace(names)
        self.absent: tuple[str, ...] = ()
        self.left_out: dict[str, str] = {}
        self.topology = topology
        self.gradients = gradients
        self.reduced = reduced
        self.axes = dict(axes or {})
        self.attrs = dict(attrs or {})
        self._held: Mapping[str, Tensor] = dict(held)

    def __repr__(self) -> str:
        shapes = {tuple(v.shape) for v in self._held.values()}
        return f"Recording({len(self)} sites, shapes {sorted(shapes, key=str)})"

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, site: str) -> Tensor:
        """The activation at one site. A looped name needs its loop (``@3``, ``@-1``)."""
        if site in self._held:
            return self._held[site]
        if reason := self.left_out.get(site.partition("@")[0]):
            raise SiteError(reason)
        return self._at(self.space.one(site))

    def stack(self, name: str) -> Tensor:
        """All loops of a looped name that ran: [loop, …], or [h, l, …] in nested cycles.

        Raises SiteError if the name is not looped, if some of its loops were not recorded, or if some of its nested
        cycles did not run.
        """
        name = self._name(name)
        axes = self.space.names[name]
        if not axes:
            raise SiteError(f"{name} runs once and has no loops to stack: use rec[{name!r}].")
        firings = self.space.firings(name)
        stacked = torch.stack([self._at(site) for site in firings])
        if len(axes) == 1:
            return stacked
        counts = [n for _, n in axes]
        if len(firings) != math.prod(counts):
            raise SiteError(f"{name} ran in {len(firings)} of {' × '.join(map(str, counts))} cycles, which are no "
                            "block to be stacked: look them up one by one.")
        return stacked.view(*counts, *stacked.shape[1:])

    def to_xarray(self, name: str) -> xarray.DataArray:
        """One name, with axis names and, where it is looped, a ``loop`` axis, numbered if some loops are absent."""
        import xarray

        name = self._name(name)
        axes = self.space.names[name]
        value = self.stack(name) if axes else self[name]
        loops = tuple(letter or "loop" for letter, _ in axes)
        ran = [site.loop[0] for site in self.space.firings(name)] if len(axes) == 1 else []
        return xarray.DataArray(
            _numpy(value), dims=loops + self._dims(name, value.ndim - len(loops)), name=name,
            coords={loops[0]: ran} if ran and len(ran) < axes[0][1] else None,
            attrs={"long_name": name, "units": "1", "definition": f"activation at {name}", **self.attrs})

    def residual_stream(self, hook: str = "hook_resid_post") -> xarray.DataArray:
        """The residual stream along the unrolled network, depth × batch × pos × d_model.

        Coordinates on depth: ``layer`` and ``loop`` (−1 where a layer runs once). ``hook`` may be
        any per-block site of the same shape, such as ``hook_resid_pre`` or ``hook_mlp_out``.
        """
        import xarray

        if self.topology is None:
            raise SiteError("this recording comes from a module without a head → mid → tail layout; "
                            "use stack(name) and to_xarray(name).")
        sites = [self.topology.site_at(depth, hook) for depth in range(self.topology.depth)]
        if missing := [site for site in sites if site not in self._held]:
            raise SiteError(f"{len(missing)} of {len(sites)} residual sites were not recorded, {missing[0]} first: "
                            f"record with names_filter='blocks.*.{hook}'.")
        layers, loops = zip(*self.topology.unrolled(), strict=True)
        value = _numpy(torch.stack([self._held[site] for site in sites]))
        dims = self._dims(sites[0].partition("@")[0], value.ndim - 1)
        return xarray.DataArray(
            value, dims=("depth", *dims), name=hook,
            coords={"depth": range(len(sites)), "layer": ("depth", list(layers)),
                    "loop": ("depth", [-1 if k is None else k for k in loops])},
            attrs={"long_name": f"residual stream ({hook})", "units": "1",
                   "definition": f"{hook} at each layer of the unrolled network", **self.attrs})

    # ------------------------------------------------------------------ private

    def _name(self, name: str) -> str:
        """The name that ``name`` is, or is an alias of."""
        if reason := self.left_out.get(name):
            raise SiteError(reason)
        known = self.space.aliases.get(name, name)
        if known not in self.space.names:
            self.space.resolve(name)  # an unknown name, or a glob: the error says which names there are
            raise SiteError(f"{name!r} is a pattern; stack() takes one name, such as {next(iter(self.space.names))!r}.")
        return known

    def _dims(self, name: str, ndim: int) -> tuple[str, ...]:
        """Axis names of a held value; numbered ones where a reducer did not name its own."""
        dims = self.axes.get(name) or (() if self.reduced else axes_of(name))
        return dims if len(dims) == ndim else tuple(f"axis_{i}" for i in range(ndim))

    def _at(self, site: Site) -> Tensor:
        try:
            return self._held[str(site)]
        except KeyError:
            held = [key for key in self._held if key.partition("@")[0] == site.name]
            raise SiteError(f"{site} was not recorded in this run; of {site.name} there are "
                            f"{', '.join(held) or 'none'}. Add it to names_filter.") from None


def _numpy(value: Tensor) -> Any:
    value = value.detach().cpu()
    return value.float().numpy() if value.dtype in (torch.bfloat16, torch.float16) else value.numpy()
