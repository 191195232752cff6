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

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooks.sites import LoopAxes, Site, SiteError, SiteSpace, Topology

if TYPE_CHECKING:
    import xarray

Reducer = Callable[[Tensor, str], Tensor]
"""A function of (activation, site name) that runs inside the hook and returns what to keep."""

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
    parts = name.split(".")
    return _AXES.get(".".join(parts[-2:])) or _AXES.get(parts[-1]) or ("batch", "pos", "d_model")


class Recorder:
    """The hook that keeps an activation. One instance serves every site of a run.

    ``pos`` cuts axis 1 before copying (for attention patterns, the query axis is left whole);
    ``reduce`` runs on the detached activation, so that what is held may be far smaller than
    what passed by; ``dtype`` and ``device`` are those of the copy.
    """

    def __init__(self, *, reduce: Reducer | None = None, pos: slice | Tensor | None = None,
                 dtype: torch.dtype | None = None, device: torch.device | str | None = None):
        self.reduce, self.pos, self.dtype, self.device = reduce, pos, dtype, device
        self.plain = reduce is None and pos is None and dtype is None and device is None
        self.held: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}

    def __call__(self, activation: Tensor, /, *, hook: Any) -> None:
        self.held[hook.site] = activation.detach().clone() if self.plain else self._kept(activation, hook.name)

    def backward(self, gradient: Tensor, /, *, hook: Any) -> None:
        self.gradients[hook.site] = self._kept(gradient, hook.name)

    def _kept(self, activation: Tensor, name: str) -> Tensor:
        value = activation.detach()
        if self.pos is not None and axes_of(name)[1:2] == ("pos",):
            value = value[:, self.pos]
        if self.reduce is not None:
            value = self.reduce(value, name)
            if not isinstance(value, Tensor):
                raise TypeError(f"the reducer returned {type(value).__name__} at {name}; it must return a tensor.")
        return value.to(device=self.device, dtype=self.dtype, copy=True)


class Recording(Mapping[str, Tensor]):
    """Activations of one run by site. Keys are full site names, in firing order.

    ``gradients`` is a second recording with the gradients at the same sites, if they were asked for.
    """

    def __init__(self, held: Mapping[str, Tensor], names: Mapping[str, LoopAxes], *,
                 topology: Topology | None = None, gradients: Recording | None = None, reduced: bool = False):
        self.space = SiteSpace(names)
        self.topology = topology
        self.gradients = gradients
        self.reduced = reduced
        self._held = dict(held)

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
        return self._at(self.space.one(site))

    def stack(self, name: str) -> Tensor:
        """All loops of a looped name: [loop, …], or [h, l, …] in nested cycles.

        Raises SiteError if the name is not looped, or if some of its loops were not recorded.
        """
        if name not in self.space.names:
            self.space.resolve(name)  # an unknown name, or a glob: the error says which names there are
            raise SiteError(f"{name!r} is a pattern; stack() takes one name, such as {next(iter(self.space.names))!r}.")
        axes = self.space.names[name]
        if not axes:
            raise SiteError(f"{name} runs once and has no loops to stack: use rec[{name!r}].")
        stacked = torch.stack([self._at(site) for site in self.space.firings(name)])
        return stacked.view(*(n for _, n in axes), *stacked.shape[1:])

    def to_xarray(self, name: str) -> xarray.DataArray:
        """One name, with axis names and, where it is looped, a ``loop`` axis."""
        import xarray

        looped = bool(self.space.names.get(name))
        value = self.stack(name) if looped else self[name]
        loops = tuple(letter or "loop" for letter, _ in self.space.names[name])
        dims = axes_of(name)
        if value.ndim != len(loops) + len(dims):
            dims = tuple(f"axis_{i}" for i in range(value.ndim - len(loops)))
        return xarray.DataArray(_numpy(value), dims=loops + dims, name=name,
                                attrs={"long_name": name, "units": "1", "definition": f"activation at {name}"})

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
        dims = axes_of(hook)
        if value.ndim != 1 + len(dims):  # a reducer took axes away
            dims = tuple(f"axis_{i}" for i in range(value.ndim - 1))
        return xarray.DataArray(
            value, dims=("depth", *dims), name=hook,
            coords={"depth": range(len(sites)), "layer": ("depth", list(layers)),
                    "loop": ("depth", [-1 if k is None else k for k in loops])},
            attrs={"long_name": f"residual stream ({hook})", "units": "1",
                   "definition": f"{hook} at each layer of the unrolled network"})

    # ------------------------------------------------------------------ private

    def _at(self, site: Site) -> Tensor:
        try:
            return self._held[str(site)]
        except KeyError:
            held = [key for key in self._held if key.startswith(f"{site.name}@")]
            raise SiteError(f"{site} was not recorded in this run; of {site.name} there are "
                            f"{', '.join(held) or 'none'}. Add it to names_filter.") from None


def _numpy(value: Tensor) -> Any:
    value = value.detach().cpu()
    return value.float().numpy() if value.dtype in (torch.bfloat16, torch.float16) else value.numpy()
