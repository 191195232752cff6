"""Checkpoints of others: the MDLM / DUO lineage's diffusion transformers as looped models.

`load_checkpoint` reads a Lightning ``.ckpt`` of MDLM (2406.07524), DUO or looped_udlm, or a bare state
dict of the same names (``.pt`` or ``.safetensors``), into a `HookedLoopMDM`. Which blocks are looped is
not in such files, so the caller gives the topology. Files are unpickled with ``weights_only=True``, and
whatever classes they mention besides tensors (configuration objects, tokenisers) become inert placeholders.

    model = load_checkpoint("looped_udlm.ckpt", Topology(n_head=1, n_mid=2, n_tail=9, n_loops=12))
    logits, rec = model.run_with_cache(tokens, n_loops=12)
    model.save_pretrained("zoo/text-udlm")                      # from here on a folder like any other

The correspondence is exact: bias-free LayerNorm, tanh-GELU, rotary positions in the half-split layout,
six-way adaLN. A model trained without time conditioning reads σ = 0 (``time_conditioning="constant"``).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from hooks.model.config import LoopMDMConfig
from hooks.model.hooked import HookedLoopMDM
from hooks.topology import Topology

TimeConditioning = Literal["none", "t", "sigma", "constant"]

_BLOCK = {
    "norm1.weight": "ln1.weight", "attn_qkv.weight": "attn.qkv.weight", "attn_out.weight": "attn.out.weight",
    "norm2.weight": "ln2.weight", "mlp.0.weight": "mlp.up.weight", "mlp.0.bias": "mlp.up.bias",
    "mlp.2.weight": "mlp.down.weight", "mlp.2.bias": "mlp.down.bias",
    "adaLN_modulation.weight": "ada.weight", "adaLN_modulation.bias": "ada.bias",
}
_TOP = {
    "vocab_embed.embedding": "embed.weight",
    "sigma_map.mlp.0.weight": "time_embed.wide.weight", "sigma_map.mlp.0.bias": "time_embed.wide.bias",
    "sigma_map.mlp.2.weight": "time_embed.out.weight", "sigma_map.mlp.2.bias": "time_embed.out.bias",
    "output_layer.norm_final.weight": "ln_final.weight",
    "output_layer.linear.weight": "unembed_weight", "output_layer.linear.bias": "unembed_bias",
    "output_layer.adaLN_modulation.weight": "final_ada.weight",
    "output_layer.adaLN_modulation.bias": "final_ada.bias",
}
_BUFFERS = ("inv_freq", "cos_cached", "sin_cached")  # rotary tables: no parameters, and computed here


def load_checkpoint(path: str | Path, topology: Topology, *, ema: bool = True, n_heads: int | None = None,
                    max_seq_len: int | None = None, mask_token_id: int | None = None,
                    time_conditioning: TimeConditioning | None = None) -> HookedLoopMDM:
    """The model in ``path``, in evaluation mode, with the blocks looped that ``topology`` says.

    ``topology.n_loops`` becomes ``max_loops`` (S_max). With ``ema``, the averaged weights are used where the
    file has them. What is not given is taken from the file's own configuration, ``n_heads`` and ``max_seq_len``
    from ``model.n_heads`` and ``model.length``, conditioning from ``time_conditioning``; the mask is the last
    token unless said otherwise. Raises FileNotFoundError or IsADirectoryError, or ValueError naming the file and
    the tensor.
    """
    path = Path(path)
    content = _read(path)
    settings = _settings(content)
    state = _backbone(content, path)
    if ema and isinstance(content.get("ema"), Mapping):
        state = _averaged(state, content["ema"], path)
    try:
        return from_dit_state(state, topology, n_heads=n_heads or settings.get("n_heads"),
                              max_seq_len=max_seq_len or settings.get("length"), mask_token_id=mask_token_id,
                              time_conditioning=time_conditioning or settings.get("time_conditioning"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def from_dit_state(state: Mapping[str, Tensor], topology: Topology, *, n_heads: int | None,
                   max_seq_len: int | None, mask_token_id: int | None = None,
                   time_conditioning: TimeConditioning | None = None) -> HookedLoopMDM:
    """A `HookedLoopMDM` from tensors under the diffusion transformer's names, without prefix.

    Widths and the vocabulary come from the tensors. Raises ValueError for a missing, foreign or misshapen
    tensor, for a topology with another number of layers, and for what tensors cannot tell and was not given.
    """
    state = {name: value for name, value in state.items() if not name.endswith(_BUFFERS)}
    foreign = [name for name in state if name not in _TOP and _block_name(name) is None]
    if "vocab_embed.embedding" not in state:
        hint = (" These are LoopMDM's own names: load the folder with HookedLoopMDM.from_pretrained."
                if "embed.weight" in state else "")
        raise ValueError(f"vocab_embed.embedding is missing; there are {', '.join(list(state)[:3]) or 'no tensors'} …"
                         + hint)
    if foreign:
        raise ValueError(f"{foreign[0]} (and {len(foreign) - 1} more) has no place in this architecture, a diffusion "
                         "transformer of the MDLM lineage.")
    layers = {int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))}
    if len(layers) != topology.n_layers:
        raise ValueError(f"the file has {len(layers)} blocks, the topology {topology.n_head} + {topology.n_mid} + "
                         f"{topology.n_tail} = {topology.n_layers}: give head, looped and tail layers that add up to "
                         f"{len(layers)}, for example Topology(1, 2, {len(layers) - 3}, {topology.n_loops}).")
    for name, value in (("n_heads", n_heads), ("max_seq_len", max_seq_len)):
        if value is None:
            raise ValueError(f"{name} cannot be read from the tensors, and the file holds no configuration: pass it.")
    assert n_heads is not None
    assert max_seq_len is not None
    config = _config(state, topology, n_heads, max_seq_len, mask_token_id, time_conditioning)
    model = HookedLoopMDM(config)
    model.load_state_dict(_renamed(state, model))
    return model.eval()


# ------------------------------------------------------------------- reading

def _read(path: Path) -> dict[str, Any]:
    """The file's content; classes that are not tensors become placeholders without behaviour."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the file in it that holds the weights "
                                "(a .ckpt, .pt or .safetensors).")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        inert: list[Any] = [(_placeholder(name), name) for name in unknown]
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint ({reason}): copy or download it again.") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a state dict or a Lightning checkpoint.")
    return dict(content)


class _Inert:
    """Stands for an object of a class that is not loaded: takes any arguments and keeps its state as data."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.arguments = args

    def __new__(cls, *args: Any, **kwargs: Any) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.__dict__["state"] = state


def _placeholder(name: str) -> type[_Inert]:
    return type(name.rpartition(".")[2], (_Inert,), {"__doc__": f"Placeholder of {name}."})


def _plain(value: Any) -> Any:
    """Configuration objects as dicts: OmegaConf keeps a node's children in _content and a leaf's value in _val."""
    if isinstance(value, _Inert):
        state = value.__dict__.get("state")
        if not isinstance(state, Mapping):
            return None
        return _plain(state["_content"] if "_content" in state else state.get("_val"))
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    """n_heads, length and time_conditioning, as far as ``hyper_parameters`` tells them."""
    parameters = _plain(content.get("hyper_parameters"))
    config = parameters.get("config", parameters) if isinstance(parameters, dict) else None
    if not isinstance(config, dict):
        return {}
    inner = config.get("model")
    found = {key: inner[key] for key in ("n_heads", "length") if isinstance(inner, dict)
             and isinstance(inner.get(key), int)}
    if isinstance(config.get("time_conditioning"), bool):
        found["time_conditioning"] = "sigma" if config["time_conditioning"] else "constant"
    return found


def _backbone(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """The denoiser's tensors without their prefix, in the order in which they were saved."""
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise ValueError(f"{path}: state_dict is a {type(state).__name__}, not a mapping of tensors.")
    tensors = {name.replace("_orig_mod.", ""): value for name, value in state.items() if isinstance(value, Tensor)}
    prefixed = {name.removeprefix("backbone."): value for name, value in tensors.items()
                if name.startswith("backbone.")}
    return prefixed or tensors


def _averaged(state: dict[str, Tensor], ema: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """``state`` with the moving averages, a list in the order of the parameters, in place of the weights."""
    shadow = ema.get("shadow_params")
    if not isinstance(shadow, list):
        raise ValueError(f"{path}: ema has no shadow_params; pass ema=False for the weights of the last step.")
    names = [name for name in state if not name.endswith(_BUFFERS)]
    if len(shadow) == len(names) - 1 and torch.equal(state["vocab_embed.embedding"],
                                                     state["output_layer.linear.weight"]):
        names.remove("output_layer.linear.weight")  # tied: one parameter under two names
        state = {**state, "output_layer.linear.weight": shadow[names.index("vocab_embed.embedding")]}
    if len(shadow) != len(names):
        raise ValueError(f"{path}: ema holds {len(shadow)} averaged tensors for {len(names)} parameters; "
                         "pass ema=False for the weights of the last step.")
    for name, value in zip(names, shadow, strict=True):
        if value.shape != state[name].shape:
            raise ValueError(f"{path}: the averaged tensor for {name} has shape {tuple(value.shape)}, the parameter "
                             f"{tuple(state[name].shape)}: they are in another order. Pass ema=False.")
    return {**state, **dict(zip(names, shadow, strict=True))}


# ------------------------------------------------------------------- building

def _config(state: Mapping[str, Tensor], topology: Topology, n_heads: int, max_seq_len: int,
            mask_token_id: int | None, time_conditioning: TimeConditioning | None) -> LoopMDMConfig:
    vocab_size, d_model = state["vocab_embed.embedding"].shape
    conditioned = "blocks.0.adaLN_modulation.weight" in state
    if not conditioned and time_conditioning not in (None, "none", "constant"):
        raise ValueError(f"time_conditioning={time_conditioning!r}, but there is no blocks.0.adaLN_modulation.weight: "
                         "this model is not conditioned on time.")
    if conditioned and time_conditioning in (None, "none"):
        raise ValueError("the model has adaLN, and neither the file nor the caller says what it reads: pass "
                         "time_conditioning='constant' (MDLM's default, σ = 0), 'sigma' or 't'.")
    wide = state.get("sigma_map.mlp.0.weight")
    up = state.get("blocks.0.mlp.0.weight")
    return LoopMDMConfig(
        vocab_size=vocab_size, mask_token_id=vocab_size - 1 if mask_token_id is None else mask_token_id,
        max_seq_len=max_seq_len, d_model=d_model, n_heads=n_heads, d_mlp=4 * d_model if up is None else up.shape[0],
        n_head_layers=topology.n_head, n_loop_layers=topology.n_mid, n_tail_layers=topology.n_tail,
        max_loops=topology.n_loops, norm="layer", qk_norm=False,
        time_conditioning=(time_conditioning or "none") if conditioned else "none",
        d_cond=128 if wide is None else wide.shape[0])


def _block_name(name: str) -> str | None:
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    return match[1] + _BLOCK[match[2]] if match and match[2] in _BLOCK else None


def _renamed(state: Mapping[str, Tensor], model: HookedLoopMDM) -> dict[str, Tensor]:
    """``state`` under the model's names; ValueError for the first tensor that is missing or misshapen."""
    expected = model.state_dict()
    place = {name: _TOP.get(name) or _block_name(name) for name in state}
    renamed = {ours: state[name] for name, ours in place.items() if ours is not None and ours in expected}
    theirs = {ours: name for name, ours in place.items()}
    for ours, value in expected.items():
        if ours not in renamed:
            match = re.fullmatch(r"(blocks\.\d+\.)(.+)", ours)
            table = {new: old for old, new in (_BLOCK if match else _TOP).items()}
            name = match[1] + table[match[2]] if match else table[ours]
            raise ValueError(f"{name} is missing.")
        if renamed[ours].shape != value.shape:
            raise ValueError(f"{theirs[ours]} has shape {tuple(renamed[ours].shape)}, the other tensors ask for "
                             f"{tuple(value.shape)}.")
    return renamed


__all__ = ["from_dit_state", "load_checkpoint"]
