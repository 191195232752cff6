"""Between TransformerLens' caches and recordings by site: depth there, (layer, loop) here.

A cache of the unrolled bridge (`hooks.bridges.tl_adapter.unroll`) names an activation by its depth,
``blocks.5.hook_resid_post``; a `Recording` names it by layer and loop,
``blocks.1.hook_resid_post@2``. `to_sites` and `to_depth` translate, without copying tensors, so that
probes read what TransformerLens cached and TransformerLens' tools read what a looped run recorded.

    logits, cache = bridge.run_with_cache(tokens)
    rec = to_sites(cache, model.config.topology(8))
    cache = to_depth(rec, bridge)                       # an ActivationCache with all of its methods
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from hooks.recording import Recording
from hooks.sites import LoopAxes, SiteError
from hooks.topology import Topology

if TYPE_CHECKING:
    from transformer_lens.ActivationCache import ActivationCache
    from transformer_lens.model_bridge import TransformerBridge

# Places whose names differ. TransformerLens' own hook_normalized is the state before the learned scale.
_SITE_TO_TL = {"ln1.hook_normalized": "ln1.hook_out", "ln2.hook_normalized": "ln2.hook_out"}
_TOP_TO_TL = {"ln_final.hook_normalized": "unembed.hook_normalized"}
_TL_TO_SITE = {tl: site for site, tl in _SITE_TO_TL.items()}
_TL_TO_TOP = {tl: site for site, tl in _TOP_TO_TL.items()}

_BLOCK = {"hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out",
          *(f"attn.hook_{x}" for x in ("q", "k", "v", "z", "rot_q", "rot_k", "attn_scores", "pattern", "result")),
          *(f"mlp.hook_{x}" for x in ("pre", "pre_linear", "post")),
          *(f"ln{i}.hook_{x}" for i in (1, 2) for x in ("scale", "normalized"))}
_TOP = {"hook_embed", "hook_pos_embed", "ln_final.hook_scale", "ln_final.hook_normalized"}
_ENTRY = {"hook_loop_in", "hook_injection", "hook_loop_embed"}


def to_sites(cache: Mapping[str, Tensor] | ActivationCache, topology: Topology) -> Recording:
    """A cache of the unrolled bridge as a `Recording`; gradients, where cached, as ``.gradients``.

    ``topology`` is that of the unrolled run, ``model.config.topology(n_loops)``. What TransformerLens
    names and a looped run does not (``attn.hook_in``, split inputs) is left out. Raises SiteError if
    the cache reaches deeper than the topology, or holds nothing that has a site.
    """
    held: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    names: dict[str, LoopAxes] = {}
    for key, value in cache.items():
        name = key.removesuffix("_grad")
        found = _site_of(name, topology)
        if found is None:
            continue
        site, axes = found
        names[site.partition("@")[0]] = axes
        (held if name == key else gradients)[site] = value
    if not held and not gradients:
        raise SiteError("no activation of this cache has a site: is it a cache of model.unroll(n_loops)?")
    order = {name: i for i, name in enumerate(names)}

    def recording(part: dict[str, Tensor], gradient: Recording | None = None) -> Recording:
        keys = sorted(part, key=lambda site: order[site.partition("@")[0]])  # stable: loops stay in order
        return Recording({site: part[site] for site in keys}, names, topology=topology, gradients=gradient)

    return recording(held, recording(gradients) if gradients else None)


def to_depth(recording: Recording, bridge: TransformerBridge) -> ActivationCache:
    """A `Recording` of the looped model as TransformerLens' ActivationCache over ``bridge``.

    ``bridge`` is the same model, unrolled to as many loops as were recorded: its weights serve the
    cache's methods. Raises SiteError if the depths differ, or the recording was reduced or has no layout.
    """
    from transformer_lens.ActivationCache import ActivationCache

    topology = recording.topology
    if topology is None or recording.reduced:
        raise SiteError("only whole activations of a head → mid → tail model have a place in an ActivationCache; "
                        "record without reduce, from a LoopMDM.")
    if topology.depth != bridge.cfg.n_layers:
        raise SiteError(f"the recording has {topology.n_loops} loops, depth {topology.depth}, the bridge has "
                        f"{bridge.cfg.n_layers} layers: use model.unroll({topology.n_loops}).")
    place = _depth_of(topology)
    values = {place(site): value for site, value in recording.items()}
    if recording.gradients is not None:
        values |= {f"{place(site)}_grad": value for site, value in recording.gradients.items()}
    return ActivationCache(values, bridge)


def entered_resid(cache: Mapping[str, Tensor] | ActivationCache,
                  up_to: int | None = None) -> Float[Tensor, "batch pos d_model"] | float:
    """What entered the residual stream at loop entries: the injected embeddings and loop embeddings, summed.

    TransformerLens' ``decompose_resid`` and ``stack_head_results`` know no such components. With them,
    decompose_resid().sum(0) + entered_resid(cache) is the final residual stream; without any, this is 0.
    ``up_to`` counts only loops below it.
    """
    total: Tensor | float = 0.0
    for key, value in cache.items():
        match = re.fullmatch(r"loop_entries\.(\d+)\.hook_(?:injection|loop_embed)", key)
        if match and (up_to is None or int(match[1]) < up_to):
            total = total + value
    return total


def depth_site(name: str, topology: Topology) -> str:
    """TransformerLens' name of a site, for its hooks: ``blocks.1.hook_resid_post@2`` → ``blocks.5.hook_resid_post``."""
    return _depth_of(topology)(name)


# ---------------------------------------------------------------------- private

def _site_of(name: str, topology: Topology) -> tuple[str, LoopAxes] | None:
    """The site of a TransformerLens name, and how it is looped; None if it has none."""
    looped: LoopAxes = (("", topology.n_loops),)
    top = _TL_TO_TOP.get(name, name)
    if top in _TOP and name not in _TOP_TO_TL:
        return top, ()
    if match := re.fullmatch(r"loop_entries\.(\d+)\.(.+)", name):
        return (f"{match[2]}@{match[1]}", looped) if match[2] in _ENTRY else None
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if not match or match[2] in _SITE_TO_TL or (place := _TL_TO_SITE.get(match[2], match[2])) not in _BLOCK:
        return None
    depth = int(match[1])
    if depth >= topology.depth:
        raise SiteError(f"{name} lies beyond depth {topology.depth} of this topology: "
                        "give the one of the run, model.config.topology(n_loops).")
    return topology.site_at(depth, place), looped if topology.is_looped(topology.unrolled()[depth][0]) else ()


def _depth_of(topology: Topology) -> Callable[[str], str]:
    depths = {key: depth for depth, key in enumerate(topology.unrolled())}

    def place(site: str) -> str:
        name, _, loop = site.partition("@")
        if name in _ENTRY:
            return f"loop_entries.{int(loop)}.{name}"
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if not match:
            return _TOP_TO_TL.get(name, name)
        key: Any = (int(match[1]), int(loop) if loop else None)
        if key not in depths:
            raise SiteError(f"{site} is not a site of a run with {topology.n_loops} loops.")
        return f"blocks.{depths[key]}.{_SITE_TO_TL.get(match[2], match[2])}"

    return place


__all__ = ["depth_site", "entered_resid", "to_depth", "to_sites"]
