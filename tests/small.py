"""Small models with randomised weights, and tokens for them, that the tests of `hooks` share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooks import HookedLoopMDM, LoopMDMConfig

MASK = 6

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "learned": {"position": "learned"},
    "both": {"position": "both"},
    "groups": {"position": "learned", "position_groups": ((0, 0, 0, 1, 1, 1, 2, 2, 2, 2), (0, 1, 2) * 3 + (0,))},
    "layernorm": {"norm": "layer"},
    "no-qk-norm": {"qk_norm": False},
    "swiglu": {"mlp": "swiglu"},
    "time-t": {"time_conditioning": "t"},
    "time-sigma": {"time_conditioning": "sigma"},
    "time-constant": {"time_conditioning": "constant"},
    "injection": {"input_injection": "add"},
    "head-injection": {"input_injection": "head"},
    "head-injection-layernorm": {"input_injection": "head", "norm": "layer", "n_head_layers": 0},
    "loop-embedding": {"loop_embedding": "learned"},
    "tied": {"tie_embeddings": True},
    "all-looped": {"n_head_layers": 0, "n_tail_layers": 0},
    "deep": {"n_head_layers": 2, "n_loop_layers": 3, "n_tail_layers": 2},
    "everything": {"position": "both", "norm": "layer", "mlp": "swiglu", "time_conditioning": "t",
                   "input_injection": "add", "loop_embedding": "learned", "tie_embeddings": True},
}
"""Each choice of the configuration at least once; `everything` has them on together."""


def small_config(**changes: Any) -> LoopMDMConfig:
    base: dict[str, Any] = {"vocab_size": 7, "mask_token_id": MASK, "max_seq_len": 10, "d_model": 16, "n_heads": 2,
                            "d_mlp": 24, "max_loops": 4, "d_cond": 12}
    return LoopMDMConfig(**{**base, **changes})


def small_model(seed: int = 0, **changes: Any) -> HookedLoopMDM:
    """A model in which every parameter is random, zero-initialised ones and norm scales included."""
    model = HookedLoopMDM(small_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            centre = 1.0 if "norm" in name or ".ln" in name or name.startswith("ln_") else 0.0
            parameter.copy_(centre + spread * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def uniform_attention(model: HookedLoopMDM) -> HookedLoopMDM:
    """The same model, changed so that every head looks everywhere alike: queries and keys are zero."""
    for block in model.blocks:
        block.attn.qkv.weight.data[:2 * model.config.d_model] = 0
    return model


def small_tokens(batch: int = 3, pos: int = 9, seed: int = 0) -> Tensor:
    """[batch, pos] ids with masks among them, at least one masked and one visible position in each row."""
    tokens = torch.randint(0, MASK + 1, (batch, pos), generator=torch.Generator().manual_seed(seed))
    tokens[:, 0], tokens[:, 1] = MASK, 1
    return tokens


def naive_injection(model: HookedLoopMDM, embedded: Tensor, entering: Tensor) -> Tensor:
    """What each loop adds to the state, spelled out; zeros without input injection."""
    config = model.config
    if config.input_injection != "head":
        return embedded if config.input_injection == "add" else torch.zeros_like(embedded)
    centred = entering - entering.mean(-1, keepdim=True) if config.norm == "layer" else entering
    return model.injection_gate * centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()


def attached(model: HookedLoopMDM) -> int:
    """How many hook functions hang on a model."""
    return sum(len(point.entries) for point in model.hook_points.values())
