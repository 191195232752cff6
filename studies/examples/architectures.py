"""Small stand-ins for Ouro and Huginn: the modules, names and order of calls of the released models, random weights.

Both releases load their model code from the hub. These follow its call structure, so that examples and tests
run anywhere; with the real code at hand (``trust_remote_code=True``) the same sites and schedules hold.

    model = OuroLike()                 # model.layers.*, model.norm, model.early_exit_gate, once per step
    model = HuginnLike()               # transformer.prelude.**, .adapter, .core_block.**, .coda.**, .ln_f
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class CausalAttention(nn.Module):
    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.n_heads = n_heads
        self.Wqkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        batch, pos, width = x.shape
        q, k, v = self.Wqkv(x).view(batch, pos, 3, self.n_heads, -1).transpose(1, 3).unbind(2)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(z.transpose(1, 2).reshape(batch, pos, width))


class GatedMLP(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.proj = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        gate, value = self.fc(x).chunk(2, dim=-1)
        return self.proj(F.silu(gate) * value)


# ----------------------------------------------------------------------- Ouro


class OuroLayer(nn.Module):
    """Norms before and after attention and MLP; takes the pass it is in as ``current_ut``."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.self_attn, self.mlp = CausalAttention(width, n_heads), GatedMLP(width)
        self.input_layernorm, self.input_layernorm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.post_attention_layernorm, self.post_attention_layernorm_2 = nn.RMSNorm(width), nn.RMSNorm(width)

    def forward(self, hidden_states: Tensor, current_ut: int = 0) -> Tensor:
        x = hidden_states
        x = x + self.input_layernorm_2(self.self_attn(self.input_layernorm(x)))
        return x + self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x)))


class OuroStack(nn.Module):
    """``total_ut_steps`` passes of the whole stack; norm and exit gate after each. Returns a tuple, as Ouro's does."""

    def __init__(self, config: Any):
        super().__init__()
        self.total_ut_steps = config.total_ut_steps
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(OuroLayer(config.hidden_size, config.num_attention_heads)
                                    for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.early_exit_gate = nn.Linear(config.hidden_size, 1)

    def forward(self, input_ids: Tensor) -> tuple[dict[str, Tensor], list[Tensor], list[Tensor]]:
        hidden = self.embed_tokens(input_ids)
        states, gates = [], []
        for current_ut in range(self.total_ut_steps):
            for layer in self.layers:
                hidden = layer(hidden, current_ut=current_ut)
            hidden = self.norm(hidden)
            states.append(hidden)
            gates.append(self.early_exit_gate(hidden))
        return {"last_hidden_state": hidden}, states, gates


class OuroLike(nn.Module):
    """Ouro's call structure."""

    def __init__(self, total_ut_steps: int = 4, num_hidden_layers: int = 3, hidden_size: int = 32,
                 vocab_size: int = 50):
        super().__init__()
        self.config = SimpleNamespace(model_type="ouro", total_ut_steps=total_ut_steps, vocab_size=vocab_size,
                                      num_hidden_layers=num_hidden_layers, hidden_size=hidden_size,
                                      num_attention_heads=2)
        self.model = OuroStack(self.config)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, input_ids: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        outputs, _, _ = self.model(input_ids)
        return self.lm_head(outputs["last_hidden_state"])


# --------------------------------------------------------------------- Huginn


class SandwichBlock(nn.Module):
    """Huginn's block: the residual sum itself is normalised."""

    def __init__(self, width: int, n_heads: int):
        super().__init__()
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (nn.RMSNorm(width) for _ in range(4))
        self.attn, self.mlp = CausalAttention(width, n_heads), GatedMLP(width)

    def forward(self, x: Tensor, step_idx: int) -> Tensor:
        x = self.norm_2(self.attn(self.norm_1(x)) + x)
        return self.norm_4(self.mlp(self.norm_3(x)) + x)


@dataclass
class HuginnOutput:
    """What the model returns, loss first, as in the release."""

    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    logits: Tensor | None = None
    latent_states: Tensor | None = None


class HuginnLike(nn.Module):
    """Huginn's call structure: prelude, adapter and core ``num_steps`` times from a random state, norm, coda, norm."""

    def __init__(self, mean_recurrence: int = 4, hidden_size: int = 32, vocab_size: int = 50):
        super().__init__()
        self.config = SimpleNamespace(model_type="huginn_raven", mean_recurrence=mean_recurrence)

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(SandwichBlock(hidden_size, 2) for _ in range(count))

        self.transformer: Any = nn.ModuleDict({
            "wte": nn.Embedding(vocab_size, hidden_size), "prelude": blocks(2),
            "adapter": nn.Linear(2 * hidden_size, hidden_size, bias=False), "core_block": blocks(2),
            "coda": blocks(2), "ln_f": nn.RMSNorm(hidden_size)})
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, input_ids: Int[Tensor, "batch pos"], num_steps: int | None = None) -> HuginnOutput:
        embeds, step = self.transformer["wte"](input_ids), -1
        for block in self.transformer["prelude"]:
            embeds = block(embeds, step := step + 1)
        x = torch.randn_like(embeds)
        for _ in range(self.config.mean_recurrence if num_steps is None else num_steps):
            x = self.transformer["adapter"](torch.cat([x, embeds], dim=-1))
            for block in self.transformer["core_block"]:
                x = block(x, step := step + 1)
        x = latent = self.transformer["ln_f"](x)
        for i, block in enumerate(self.transformer["coda"], start=1):
            x = block(x, -i)
        return HuginnOutput(logits=self.lm_head(self.transformer["ln_f"](x)), latent_states=latent)
