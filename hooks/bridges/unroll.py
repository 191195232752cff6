"""The unrolled network: a LoopMDM laid out depth by depth, over the very same parameters.

Every pass of a looped layer becomes a layer of its own, in a module tree whose parts have the
names and shapes that `hooks.bridges.tl_adapter` maps to TransformerLens components: queries, keys and
values apart, one entry module per loop, the final norm's scale read as part of the unembedding.
Nothing is copied. A weight that TransformerLens wants in another shape is computed from the
looped model's parameter when it is read, so that editing one edits the other, and gradients
arrive at the looped model's own parameters.

    unrolled = UnrolledLoopMDM(model, n_loops=8)
    logits = unrolled(tokens)                       # equals model(tokens, n_loops=8)
    len(unrolled.layers)                            # n_head + 8 · n_mid + n_tail
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.bridges.weight_views import Condition, Gate, GatedLinear, LinearRows, PositionTable, Readout
from hooks.model.layers import MLP, Attention, Block, NormLayer, Rotary, rotate
from hooks.model.loopmdm import LoopMDM


class UnrolledLoopMDM(nn.Module):
    """``looped`` as a plain stack of ``topology.depth`` layers, sharing its parameters.

    ``t`` fixes the noise level of a model conditioned on time: then adaLN is the same for every
    example, and is read as part of the weights around it (the output projections carry its gates,
    the unembedding its scale and shift), which is what TransformerLens' decompositions assume.
    Without ``t``, each example is conditioned on its own share of masks, as in the looped model.
    """

    def __init__(self, looped: LoopMDM, n_loops: int | None = None, *, t: float | None = None):
        super().__init__()
        config = looped.config
        if t is not None and not config.conditioned:
            raise ValueError("t has no effect: this model is not conditioned on time (time_conditioning='none').")
        if config.time_conditioning == "constant":
            t = 0.0
        self.looped = looped
        self.n_loops = looped._checked_loops(n_loops)
        self.topology = config.topology(self.n_loops)
        self.t = t
        fixed = None if t is None else self._fixed_condition
        self.tok_embed = looped.embed
        if config.position != "rotary":
            self.pos = PositionTable(looped)
        self.entries = nn.ModuleList(LoopEntry(looped, k) for k in range(self.n_loops))
        self.layers = nn.ModuleList(UnrolledBlock(_block(looped, layer), fixed)
                                    for layer, _ in self.topology.unrolled())
        self.ln_out = UnrolledNorm(looped.ln_final, scaled=False)
        self.head = Readout(looped, fixed)
        self.train(looped.training)

    def forward(self, input_ids: Int[Tensor, "batch pos"] | None = None, *,
                t: Float[Tensor, "batch"] | float | None = None, attention_mask: Tensor | None = None,
                inputs_embeds: Float[Tensor, "batch pos d_model"] | None = None) -> Float[Tensor, "batch pos vocab"]:
        """Logits. ``inputs_embeds`` is the residual stream that enters the first layer, in place of tokens.

        Raises ValueError for what the looped model refuses, for an ``attention_mask`` that hides
        positions, and for ``inputs_embeds`` where the tokens themselves are needed.
        """
        if attention_mask is not None and not bool((attention_mask == 1).all()):
            raise ValueError("the unrolled network attends to every position: attention_mask must be all ones. Give it "
                             "sequences of one length, or run the looped model, which takes padding.")
        if input_ids is not None:
            tokens, _ = self.looped._checked(input_ids, self.n_loops)
            x = self.tok_embed(tokens)
            if hasattr(self, "pos"):
                x = x + self.pos(tokens)
        elif inputs_embeds is not None:
            x = self._entering(inputs_embeds)
        else:
            raise ValueError("give the tokens (input_ids), or the residual stream that enters layer 0 (inputs_embeds).")
        condition = self._condition(input_ids, t)
        embedded = injected = x
        rotary = self.looped.rotary(x.shape[1])
        for depth, layer in enumerate(self.layers):
            loop = self.loop_entered_at(depth)
            if loop is not None:
                injected = self.looped.injected(embedded, x) if loop == 0 else injected
                x = self.entries[loop](x, injected)
            x = layer(x, rotary=rotary, condition=condition)
        return self.head(self.ln_out(x), condition=condition)

    def loop_entered_at(self, depth: int) -> int | None:
        """The loop whose first layer is at ``depth``, or None."""
        past = depth - self.topology.n_head
        loop, within = divmod(past, self.topology.n_mid)
        return loop if past >= 0 and loop < self.n_loops and within == 0 else None

    # ------------------------------------------------------------------ private

    def _fixed_condition(self) -> Condition:
        assert self.t is not None
        ids = torch.zeros(1, 1, dtype=torch.long, device=self.looped.unembed_bias.device)
        condition = self.looped.condition(ids, self.t)
        assert condition is not None
        return condition

    def _condition(self, tokens: Tensor | None, t: Tensor | float | None) -> Condition | None:
        if not self.looped.config.conditioned:
            if t is not None:
                raise ValueError("t has no effect: this model is not conditioned on time.")
            return None
        if self.t is not None:
            if t is not None and self.looped.config.time_conditioning != "constant":
                raise ValueError(f"this network was unrolled at t={self.t}: unroll again for another noise level, "
                                 "or unroll without t to give one per forward.")
            return self._fixed_condition()
        if tokens is None:
            if t is None:
                raise ValueError("without tokens the noise level is unknown: pass t, or unroll(n_loops, t=...).")
            tokens = torch.zeros(1, 1, dtype=torch.long, device=self.looped.unembed_bias.device)
        return self.looped.condition(tokens, t)

    def _entering(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        resumed = getattr(self.layers[0], "_start_at_layer_idx", None)
        last_entry = self.topology.n_head + (self.n_loops - 1) * self.topology.n_mid
        injection = self.looped.config.input_injection
        first = self.topology.n_head if injection == "head" else 0   # where what is injected is known no more
        if injection != "none" and resumed is not None and first <= resumed < last_entry:
            what = "the head's output" if injection == "head" else "the token embedding"
            raise ValueError(f"start_at_layer={resumed} cannot be used here: this model adds {what} again at each "
                             f"later loop (input_injection={injection!r}), and a residual stream does not hold it. "
                             "Patch hook_resid_pre in a run from tokens instead.")
        if residual.shape[1] > self.looped.config.max_seq_len:
            raise ValueError(f"the sequence has {residual.shape[1]} positions, the model takes at most "
                             f"{self.looped.config.max_seq_len} (max_seq_len).")
        return residual


class UnrolledBlock(nn.Module):
    """One layer at one depth. ``fixed`` gives the condition of a network unrolled at one noise level.

    What is added to the residual stream is ``attn`` and ``mlp``'s output where the gates of adaLN
    are absent or part of the weights, and ``attn_gate`` and ``mlp_gate``'s where they differ by example.
    """

    def __init__(self, source: Block, fixed: Callable[[], Condition] | None):
        super().__init__()
        conditioned = source.ada is not None
        self.source = source
        self.gated = conditioned and fixed is None
        attn_gate: Gate = None
        mlp_gate: Gate = None
        if conditioned and fixed is not None:  # adaLN gives shift, scale and gate of attention, then of the MLP
            attn_gate, mlp_gate = partial(_chunk, source, fixed, 2), partial(_chunk, source, fixed, 5)
        self.ln1 = UnrolledNorm(source.ln1)
        self.attn = UnrolledAttention(source.attn, attn_gate)
        self.ln2 = UnrolledNorm(source.ln2)
        self.mlp = (UnrolledGatedMLP if source.mlp.gated else UnrolledMLP)(source.mlp, mlp_gate)
        self.resid_mid = nn.Identity()
        if self.gated:
            self.attn_gate, self.mlp_gate = nn.Identity(), nn.Identity()

    def forward(self, hidden_states: Float[Tensor, "batch pos d_model"], rotary: Rotary | None = None,
                condition: Condition | None = None) -> Float[Tensor, "batch pos d_model"]:
        x = hidden_states
        if self.source.ada is None:
            x = self.resid_mid(x + self.attn(self.ln1(x), rotary=rotary))
            return x + self.mlp(self.ln2(x))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.source.ada(condition)[:, None].chunk(6, dim=-1)
        attn_out = self.attn(self.ln1(x) * (1 + scale_a) + shift_a, rotary=rotary, modulation=(shift_a, scale_a))
        x = self.resid_mid(x + (self.attn_gate(gate_a * attn_out) if self.gated else attn_out))
        mlp_out = self.mlp(self.ln2(x) * (1 + scale_m) + shift_m)
        return x + (self.mlp_gate(gate_m * mlp_out) if self.gated else mlp_out)


class UnrolledNorm(nn.Module):
    """A looped model's norm; ``scaled=False`` leaves its learned scale to the weights that follow."""

    bias = None

    def __init__(self, source: NormLayer, scaled: bool = True):
        super().__init__()
        self.source, self.scaled = source, scaled

    @property
    def weight(self) -> Float[Tensor, "d_model"]:
        return self.source.weight if self.scaled else torch.ones_like(self.source.weight)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        weight = self.source.weight if self.scaled else None
        if self.source.kind == "layer":
            return F.layer_norm(x, (self.source.width,), weight, None, self.source.eps)
        return F.rms_norm(x, (self.source.width,), weight, self.source.eps)


class UnrolledAttention(nn.Module):
    """Bidirectional attention with queries, keys and values as separate layers."""

    def __init__(self, source: Attention, gate: Gate):
        super().__init__()
        d = source.n_heads * source.d_head
        self.source, self.n_heads, self.head_dim = source, source.n_heads, source.d_head
        self.q, self.k, self.v = (LinearRows(source.qkv, i * d, (i + 1) * d) for i in range(3))
        self.o = source.out if gate is None else GatedLinear(source.out, gate)

    def turned(self, q: Float[Tensor, "batch pos head d_head"], k: Float[Tensor, "batch pos head d_head"],
               rotary: Rotary | None) -> tuple[Float[Tensor, "batch head pos d_head"], ...]:
        """Queries and keys as the scores take them: QK-norm, rotation, heads before positions."""
        if self.source.qk_norm:
            q = F.rms_norm(q, (self.head_dim,), self.source.q_norm, self.source.eps)
            k = F.rms_norm(k, (self.head_dim,), self.source.k_norm, self.source.eps)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return q.transpose(1, 2), k.transpose(1, 2)

    def scores(self, q: Float[Tensor, "batch head pos d_head"],
               k: Float[Tensor, "batch head pos d_head"]) -> Float[Tensor, "batch head query key"]:
        return q @ k.transpose(-1, -2) / math.sqrt(self.head_dim)

    def forward(self, hidden_states: Float[Tensor, "batch pos d_model"], rotary: Rotary | None = None,
                modulation: Any = None) -> Float[Tensor, "batch pos d_model"]:
        batch, pos, _ = hidden_states.shape
        q, k, v = (layer(hidden_states).view(batch, pos, self.n_heads, self.head_dim)
                   for layer in (self.q, self.k, self.v))
        q, k = self.turned(q, k, rotary)
        z = F.scaled_dot_product_attention(q, k, v.transpose(1, 2)).transpose(1, 2)
        return self.o(z.reshape(batch, pos, -1))


class UnrolledMLP(nn.Module):
    """GELU MLP."""

    def __init__(self, source: MLP, gate: Gate):
        super().__init__()
        self.fc_in = source.up
        self.fc_out = source.down if gate is None else GatedLinear(source.down, gate)

    def forward(self, hidden_states: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.fc_out(F.gelu(self.fc_in(hidden_states), approximate="tanh"))


class UnrolledGatedMLP(nn.Module):
    """SwiGLU MLP, its gate and its value as separate layers."""

    def __init__(self, source: MLP, gate: Gate):
        super().__init__()
        d_mlp = source.down.in_features
        self.fc_gate, self.fc_in = LinearRows(source.up, 0, d_mlp), LinearRows(source.up, d_mlp, 2 * d_mlp)
        self.fc_out = source.down if gate is None else GatedLinear(source.down, gate)

    def forward(self, hidden_states: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.fc_out(F.silu(self.fc_gate(hidden_states)) * self.fc_in(hidden_states))


class LoopEntry(nn.Module):
    """What happens where loop ``k`` begins: input injection and the loop embedding, if there are any."""

    def __init__(self, looped: LoopMDM, k: int):
        super().__init__()
        self.injects = looped.config.input_injection != "none"
        self.table = looped.loop_embed if looped.config.loop_embedding == "learned" else None
        self.row = min(k, looped.config.max_loops - 1)

    def forward(self, hidden_states: Float[Tensor, "batch pos d_model"], injected: Float[Tensor, "batch pos d_model"],
                injection: Callable[[Tensor], Tensor] = lambda x: x,
                loop_embed: Callable[[Tensor], Tensor] = lambda x: x) -> Float[Tensor, "batch pos d_model"]:
        x = hidden_states
        if self.injects:
            x = x + injection(injected)
        if self.table is not None:
            x = x + loop_embed(self.table.weight[self.row].expand_as(x))
        return x


def _block(looped: LoopMDM, layer: int) -> Block:
    block = looped.blocks[layer]
    assert isinstance(block, Block)
    return block


def _chunk(source: Block, fixed: Callable[[], Condition], i: int) -> Float[Tensor, "d_model"]:
    assert source.ada is not None
    return source.ada(fixed())[0].chunk(6)[i]
