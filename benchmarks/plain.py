"""The same model in plain PyTorch, without hook points: the yardstick of the benchmarks.

`PlainLoopMDM` covers the default configuration (rotary positions, RMSNorm, QK-norm, GELU, untied, no
conditioning) and shares the parameters of a `hooks.LoopMDM`. A test holds their outputs equal, bit for
bit. Beside the forward there are two copies of it as people write them by hand: one that appends clones,
one that edits in the middle.

    plain = PlainLoopMDM(model)
    logits = plain(tokens, n_loops=8)
    logits, kept = plain.forward_keeping(tokens, n_loops=8)         # resid_post of every layer and loop
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.model.loopmdm import LoopMDM, LoopMDMConfig


class PlainAttention(nn.Module):
    """Bidirectional attention with QK-norm and RoPE."""

    def __init__(self, source: nn.Module, config: LoopMDMConfig):
        super().__init__()
        self.n_heads, self.d_head, self.eps = config.n_heads, config.d_head, config.norm_eps
        self.qkv, self.out = source.qkv, source.out
        self.q_norm, self.k_norm = source.q_norm, source.k_norm

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, pos, _ = x.shape
        q, k, v = self.qkv(x).view(batch, pos, 3, self.n_heads, self.d_head).unbind(2)
        q = rotated(F.rms_norm(q, (self.d_head,), self.q_norm, self.eps), cos, sin).transpose(1, 2)
        k = rotated(F.rms_norm(k, (self.d_head,), self.k_norm, self.eps), cos, sin).transpose(1, 2)
        z = F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2)
        return self.out(z.reshape(batch, pos, -1))


class PlainMLP(nn.Module):
    """Up, tanh-GELU, down."""

    def __init__(self, source: nn.Module):
        super().__init__()
        self.up, self.down = source.up, source.down

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class PlainBlock(nn.Module):
    """A pre-norm block."""

    def __init__(self, source: nn.Module, config: LoopMDMConfig):
        super().__init__()
        self.ln1, self.ln2 = (nn.RMSNorm(config.d_model, eps=config.norm_eps) for _ in range(2))
        self.ln1.weight, self.ln2.weight = source.ln1.weight, source.ln2.weight
        self.attn, self.mlp = PlainAttention(source.attn, config), PlainMLP(source.mlp)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x), cos, sin)
        return x + self.mlp(self.ln2(x))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


class PlainLoopMDM(nn.Module):
    """Head, looped middle and tail of ``source``, with its parameters."""

    def __init__(self, source: LoopMDM):
        super().__init__()
        config = source.config
        default = LoopMDMConfig(config.vocab_size, config.mask_token_id, config.max_seq_len)
        for field in ("position", "norm", "qk_norm", "mlp", "time_conditioning", "input_injection", "loop_embedding",
                      "tie_embeddings"):
            if getattr(config, field) != getattr(default, field):
                raise ValueError(f"PlainLoopMDM is written for {field}={getattr(default, field)!r} only.")
        self.config = config
        self.embed = source.embed
        self.blocks = nn.ModuleList(PlainBlock(block, config) for block in source.blocks)
        self.ln_final = source.ln_final.weight
        self.unembed_weight, self.unembed_bias = source.unembed_weight, source.unembed_bias
        rotary = source.rotary(config.max_seq_len)
        assert rotary is not None
        for name, value in zip(("rotary_cos", "rotary_sin", "mask_bias"), (*rotary, source.mask_bias), strict=True):
            self.register_buffer(name, value, persistent=False)

    def forward(self, tokens: Tensor, n_loops: int) -> Tensor:
        config = self.config
        cos, sin = self.rotary_cos[: tokens.shape[1]], self.rotary_sin[: tokens.shape[1]]
        x = self.embed(tokens)
        first, last = config.n_head_layers, config.n_head_layers + config.n_loop_layers
        for block in self.blocks[:first]:
            x = block(x, cos, sin)
        middle, tail = list(self.blocks[first:last]), list(self.blocks[last:])
        for _ in range(n_loops):
            for block in middle:
                x = block(x, cos, sin)
        for block in tail:
            x = block(x, cos, sin)
        x = F.rms_norm(x, (config.d_model,), self.ln_final, config.norm_eps)
        return F.linear(x, self.unembed_weight, self.unembed_bias + self.mask_bias)

    def forward_keeping(self, tokens: Tensor, n_loops: int) -> tuple[Tensor, list[Tensor]]:
        """The forward, copied, with a line after each block that keeps a clone."""
        config = self.config
        cos, sin = self.rotary_cos[: tokens.shape[1]], self.rotary_sin[: tokens.shape[1]]
        kept = []
        x = self.embed(tokens)
        first, last = config.n_head_layers, config.n_head_layers + config.n_loop_layers
        for block in self.blocks[:first]:
            x = block(x, cos, sin)
            kept.append(x.detach().clone())
        middle, tail = list(self.blocks[first:last]), list(self.blocks[last:])
        for _ in range(n_loops):
            for block in middle:
                x = block(x, cos, sin)
                kept.append(x.detach().clone())
        for block in tail:
            x = block(x, cos, sin)
            kept.append(x.detach().clone())
        x = F.rms_norm(x, (config.d_model,), self.ln_final, config.norm_eps)
        return F.linear(x, self.unembed_weight, self.unembed_bias + self.mask_bias), kept

    def forward_steered(self, tokens: Tensor, n_loops: int, layer: int, loop: int, vector: Tensor) -> Tensor:
        """The forward, copied, with ``vector`` added after one looped layer in one loop."""
        config = self.config
        cos, sin = self.rotary_cos[: tokens.shape[1]], self.rotary_sin[: tokens.shape[1]]
        x = self.embed(tokens)
        first, last = config.n_head_layers, config.n_head_layers + config.n_loop_layers
        for block in self.blocks[:first]:
            x = block(x, cos, sin)
        middle, tail = list(self.blocks[first:last]), list(self.blocks[last:])
        for k in range(n_loops):
            for i, block in enumerate(middle, first):
                x = block(x, cos, sin)
                if (i, k) == (layer, loop):
                    x = x + vector
        for block in tail:
            x = block(x, cos, sin)
        x = F.rms_norm(x, (config.d_model,), self.ln_final, config.norm_eps)
        return F.linear(x, self.unembed_weight, self.unembed_bias + self.mask_bias)
