"""The parts of a denoiser: norm, rotary positions, attention, MLP, block, timestep conditioning.

Plain bidirectional transformer parts with `HookPoint`s under TransformerLens' names.
`hooks.model.loopmdm` assembles them into head → mid^S → tail. Attention runs the fused
kernel, and materialises scores and patterns only in the loops for which they were asked.

    block = Block(config, layer=1, points=lambda name: HookPoint(name, clock, looped=True))
    x = block(x, rotary, condition=None)                      # [batch, pos, d_model]
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.hook_points import HookPoint

if TYPE_CHECKING:
    from hooks.model.config import LoopMDMConfig

Points = Callable[[str], HookPoint]
Rotary = tuple[Float[Tensor, "pos d_head"], Float[Tensor, "pos d_head"]]


class NormLayer(nn.Module):
    """RMSNorm (1910.07467) or bias-free LayerNorm over the last axis, with a learned scale.

    ``hook_scale`` [batch, pos, 1] is what the input is divided by, ``hook_normalized``
    [batch, pos, d_model] the output, scale weights included.
    """

    def __init__(self, kind: str, width: int, eps: float, points: Points, name: str):
        super().__init__()
        self.kind, self.width, self.eps = kind, width, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.hook_scale = points(f"{name}.hook_scale")
        self.hook_normalized = points(f"{name}.hook_normalized")

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        if self.hook_scale.entries and self.hook_scale.wanted():
            centred = x - x.mean(-1, keepdim=True) if self.kind == "layer" else x
            squares = centred.to(torch.promote_types(x.dtype, torch.float32)).pow(2)  # float16 overflows at 256²
            scale = self.hook_scale((squares.mean(-1, keepdim=True) + self.eps).sqrt().to(x.dtype))
            return self.hook_normalized(centred / scale * self.weight)
        if self.kind == "layer":
            return self.hook_normalized(F.layer_norm(x, (self.width,), self.weight, None, self.eps))
        return self.hook_normalized(F.rms_norm(x, (self.width,), self.weight, self.eps))


def rotary_tables(n_pos: int, d_head: int, base: float) -> Rotary:
    """cos and sin of RoPE (2104.09864) in the half-split layout, each [pos, d_head]."""
    inverse = base ** (-torch.arange(0, d_head, 2, dtype=torch.float64) / d_head)
    angles = torch.arange(n_pos, dtype=torch.float64)[:, None] * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos().float(), angles.sin().float()


def rotate(x: Float[Tensor, "batch pos head d_head"], rotary: Rotary) -> Float[Tensor, "batch pos head d_head"]:
    """Apply RoPE; ``rotary`` is already cut to x's positions."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def attend(q: Float[Tensor, "batch head pos d_head"], k: Float[Tensor, "batch head pos d_head"],
           v: Float[Tensor, "batch head pos d_head"],
           keys: Bool[Tensor, "batch 1 1 pos"] | None = None) -> Float[Tensor, "batch head pos d_head"]:
    """softmax(q kᵀ / √d_head) v over ``keys`` (by default all), by the fused kernel.

    Under autocast on a CPU it stays in float32: in bfloat16 torch's kernel takes six times as long there.
    """
    if torch.is_autocast_enabled("cpu") and q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), keys)
    return F.scaled_dot_product_attention(q, k, v, keys)


class Attention(nn.Module):
    """Bidirectional multi-head attention without biases.

    Sites: ``hook_q``, ``hook_k`` (before QK-norm and rotation), ``hook_rot_q``,
    ``hook_rot_k`` (what the scores are made of), ``hook_v``, ``hook_z``
    [batch, pos, head, d_head]; ``hook_attn_scores``, ``hook_pattern``
    [batch, head, query, key]; ``hook_result`` [batch, pos, head, d_model]. Scores of padded keys are −∞, before
    and after what hooks make of them.
    """

    def __init__(self, config: LoopMDMConfig, points: Points, name: str):
        super().__init__()
        d = config.d_model
        self.n_heads, self.d_head = config.n_heads, config.d_head
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out = nn.Linear(d, d, bias=False)
        self.qk_norm = config.qk_norm
        self.eps = config.norm_eps
        if config.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(self.d_head))
            self.k_norm = nn.Parameter(torch.ones(self.d_head))
        self.hook_q, self.hook_k, self.hook_v, self.hook_rot_q, self.hook_rot_k = (
            points(f"{name}.hook_{what}") for what in ("q", "k", "v", "rot_q", "rot_k"))
        self.hook_attn_scores = points(f"{name}.hook_attn_scores")
        self.hook_pattern = points(f"{name}.hook_pattern")
        self.hook_z = points(f"{name}.hook_z")
        self.hook_result = points(f"{name}.hook_result")

    def forward(self, x: Float[Tensor, "batch pos d_model"], rotary: Rotary | None,
                keys: Bool[Tensor, "batch 1 1 pos"] | None = None) -> Float[Tensor, "batch pos d_model"]:
        batch, pos, _ = x.shape
        q, k, v = self.qkv(x).view(batch, pos, 3, self.n_heads, self.d_head).unbind(2)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        if self.qk_norm:
            q_norm, k_norm = self.q_norm, self.k_norm
            if q.dtype is not q_norm.dtype:  # autocast halves q and k
                q, k = q.to(q_norm.dtype), k.to(k_norm.dtype)
            q = F.rms_norm(q, (self.d_head,), q_norm, self.eps)
            k = F.rms_norm(k, (self.d_head,), k_norm, self.eps)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k = self.hook_rot_q(q).transpose(1, 2), self.hook_rot_k(k).transpose(1, 2)
        v = v.transpose(1, 2)
        if self._pattern_wanted():
            scores = self.hook_attn_scores(_over(keys, q @ k.transpose(-1, -2) / math.sqrt(self.d_head)))
            z = self.hook_pattern(_over(keys, scores).softmax(-1)) @ v
        else:
            z = attend(q, k, v, keys)
        z = self.hook_z(z.transpose(1, 2))
        if self.hook_result.entries and self.hook_result.wanted():
            heads = self.out.weight.view(-1, self.n_heads, self.d_head)
            return self.hook_result(torch.einsum("bphd,mhd->bphm", z, heads)).sum(2)
        return self.out(z.reshape(batch, pos, -1))

    def _pattern_wanted(self) -> bool:
        scores, pattern = self.hook_attn_scores, self.hook_pattern
        return bool((scores.entries and scores.wanted()) or (pattern.entries and pattern.wanted()))


def _over(keys: Bool[Tensor, "batch 1 1 pos"] | None,
          scores: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    return scores if keys is None else scores.masked_fill(~keys, -torch.inf)


class MLP(nn.Module):
    """GELU (tanh) or SwiGLU (2002.05202) MLP; ``hook_pre``/``hook_post`` are [batch, pos, d_mlp].

    In SwiGLU ``hook_pre`` is the gate before its SiLU, ``hook_pre_linear`` the value it gates.
    """

    def __init__(self, config: LoopMDMConfig, points: Points, name: str):
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.up = nn.Linear(config.d_model, config.d_mlp * (2 if self.gated else 1), bias=not self.gated)
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=not self.gated)
        self.hook_pre = points(f"{name}.hook_pre")
        if self.gated:
            self.hook_pre_linear = points(f"{name}.hook_pre_linear")
        self.hook_post = points(f"{name}.hook_post")

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.gated:
            gate, value = self.up(x).chunk(2, dim=-1)
            return self.down(self.hook_post(F.silu(self.hook_pre(gate)) * self.hook_pre_linear(value)))
        return self.down(self.hook_post(F.gelu(self.hook_pre(self.up(x)), approximate="tanh")))


class Block(nn.Module):
    """Pre-norm transformer block, with optional adaLN-Zero conditioning (2212.09748).

    ``hook_attn_out`` and ``hook_mlp_out`` are what is added to the residual stream, gates
    included: resid_pre + attn_out = resid_mid and resid_mid + mlp_out = resid_post exactly.
    """

    def __init__(self, config: LoopMDMConfig, layer: int, points: Points):
        super().__init__()
        name = f"blocks.{layer}"
        self.hook_resid_pre = points(f"{name}.hook_resid_pre")
        self.ln1 = NormLayer(config.norm, config.d_model, config.norm_eps, points, f"{name}.ln1")
        self.attn = Attention(config, points, f"{name}.attn")
        self.hook_attn_out = points(f"{name}.hook_attn_out")
        self.hook_resid_mid = points(f"{name}.hook_resid_mid")
        self.ln2 = NormLayer(config.norm, config.d_model, config.norm_eps, points, f"{name}.ln2")
        self.mlp = MLP(config, points, f"{name}.mlp")
        self.hook_mlp_out = points(f"{name}.hook_mlp_out")
        self.hook_resid_post = points(f"{name}.hook_resid_post")
        self.ada = nn.Linear(config.d_cond, 6 * config.d_model) if config.conditioned else None

    def forward(self, x: Float[Tensor, "batch pos d_model"], rotary: Rotary | None,
                condition: Float[Tensor, "batch d_cond"] | None,
                keys: Bool[Tensor, "batch 1 1 pos"] | None = None) -> Float[Tensor, "batch pos d_model"]:
        """``keys`` are the positions that may be attended to, by default all."""
        x = self.hook_resid_pre(x)
        if self.ada is None:
            x = self.hook_resid_mid(x + self.hook_attn_out(self.attn(self.ln1(x), rotary, keys)))
            return self.hook_resid_post(x + self.hook_mlp_out(self.mlp(self.ln2(x))))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.ada(condition)[:, None].chunk(6, dim=-1)
        attn_out = gate_a * self.attn(self.ln1(x) * (1 + scale_a) + shift_a, rotary, keys)
        x = self.hook_resid_mid(x + self.hook_attn_out(attn_out))
        mlp_out = gate_m * self.mlp(self.ln2(x) * (1 + scale_m) + shift_m)
        return self.hook_resid_post(x + self.hook_mlp_out(mlp_out))


class TimestepEmbedding(nn.Module):
    """Sinusoidal features of a scalar, through a two-layer SiLU MLP (2212.09748): [batch] → [batch, d_cond]."""

    N_FEATURES = 256

    def __init__(self, d_cond: int):
        super().__init__()
        self.wide = nn.Linear(self.N_FEATURES, d_cond)
        self.out = nn.Linear(d_cond, d_cond)

    def forward(self, level: Float[Tensor, "batch"]) -> Float[Tensor, "batch d_cond"]:
        half = self.N_FEATURES // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=level.device) / half)
        angles = level[:, None].float() * frequencies
        features = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.wide.weight.dtype)
        return F.silu(self.out(F.silu(self.wide(features))))
