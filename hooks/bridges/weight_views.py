"""Weights in the shapes that TransformerLens asks for, read from the looped model's parameters when asked.

None of these layers owns a weight. `LinearRows` is a part of a fused layer, `GatedLinear` a layer
with its output gate multiplied in, `PositionTable` the sum of position tables, `Readout` the unembedding
with the final norm's scale in it. `hooks.bridges.unroll` builds the unrolled network from them.

    LinearRows(block.attn.qkv, 0, 64).weight        # a view: editing qkv.weight edits it
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooks.model.loopmdm import LoopMDM

Condition = Float[Tensor, "#batch d_cond"]
"""One row for all examples where a network is unrolled at one noise level."""
Gate = Callable[[], Float[Tensor, "d_model"]] | None


# nn.Linear declares weight and bias as parameters; here they are read from another layer's: the ignored overrides.


class LinearRows(nn.Linear):
    """Rows ``start:stop`` of a fused linear layer, as a layer of its own that owns nothing."""

    def __init__(self, fused: nn.Linear, start: int, stop: int):
        nn.Module.__init__(self)
        self.fused, self.start, self.stop = fused, start, stop
        self.in_features, self.out_features = fused.in_features, stop - start

    @property  # a view where nn.Linear holds a parameter; so is every weight and bias below
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        return self.fused.weight[self.start: self.stop]

    @property
    def bias(self) -> Float[Tensor, "out"] | None:  # type: ignore[override]
        return None if self.fused.bias is None else self.fused.bias[self.start: self.stop]


class GatedLinear(nn.Linear):
    """A linear layer whose output is multiplied by a gate, read as one layer with gated weights."""

    def __init__(self, source: nn.Linear, gate: Callable[[], Float[Tensor, "out"]]):
        nn.Module.__init__(self)
        self.source, self.gate = source, gate
        self.in_features, self.out_features = source.in_features, source.out_features

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # type: ignore[override]
        return self.source.weight * self.gate()[:, None]

    @property
    def bias(self) -> Float[Tensor, "out"] | None:  # type: ignore[override]
        return None if self.source.bias is None else self.source.bias * self.gate()


class PositionTable(nn.Module):
    """Learned positions: one table, or the sum of the tables of ``position_groups``."""

    def __init__(self, looped: LoopMDM):
        super().__init__()
        self.looped_embed = looped.pos_embed
        self.register_buffer("ids", looped.position_ids, persistent=False)

    ids: Int[Tensor, "group pos"]

    @property
    def weight(self) -> Float[Tensor, "pos d_model"]:
        """The vector added at each position, up to max_seq_len."""
        return self._sum(self.ids)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self._sum(self.ids[:, : tokens.shape[1]]).expand(len(tokens), -1, -1)

    def _sum(self, ids: Int[Tensor, "group pos"]) -> Float[Tensor, "pos d_model"]:
        return torch.stack([table(group) for table, group in zip(self.looped_embed, ids, strict=True)]).sum(0)


class Readout(nn.Module):
    """The unembedding, with the final norm's scale, and adaLN's where ``t`` is fixed, as part of it.

    ``weight`` [vocab, d_model] and ``bias`` [vocab] are such that logits = normalised state · weightᵀ + bias.
    """

    def __init__(self, looped: LoopMDM, fixed: Callable[[], Condition] | None):
        super().__init__()
        self.norm, self.ada, self._fixed = looped.ln_final, looped.final_ada, fixed
        self.embed = looped.embed if looped.unembed_weight is None else None
        self.vocab_weight, self.vocab_bias = looped.unembed_weight, looped.unembed_bias
        self.register_buffer("mask_bias", looped.mask_bias, persistent=False)

    mask_bias: Float[Tensor, "vocab"]

    def gained(self, normalised: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The looped model's ``ln_final.hook_normalized``: with the learned scale."""
        return normalised * self.norm.weight

    def project(self, gained: Float[Tensor, "batch pos d_model"],
                condition: Condition | None = None) -> Float[Tensor, "batch pos vocab"]:
        if self.ada is not None:
            shift, scale = self.ada(self._fixed() if condition is None and self._fixed else condition)[:, None].chunk(
                2, dim=-1)
            gained = gained * (1 + scale) + shift
        return F.linear(gained, self._raw(), self.vocab_bias + self.mask_bias)

    def forward(self, normalised: Float[Tensor, "batch pos d_model"],
                condition: Condition | None = None) -> Float[Tensor, "batch pos vocab"]:
        return self.project(self.gained(normalised), condition)

    @property
    def weight(self) -> Float[Tensor, "vocab d_model"]:
        gain: Tensor = self.norm.weight
        if self.ada is not None:
            gain = gain * (1 + self._modulation()[1])
        return self._raw() * gain

    @property
    def bias(self) -> Float[Tensor, "vocab"]:
        bias = self.vocab_bias + self.mask_bias
        return bias if self.ada is None else bias + self._raw() @ self._modulation()[0]

    def _raw(self) -> Float[Tensor, "vocab d_model"]:
        if self.embed is not None:
            return self.embed.weight
        assert self.vocab_weight is not None
        return self.vocab_weight

    def _modulation(self) -> tuple[Tensor, Tensor]:
        if self._fixed is None:
            raise NotImplementedError("the unembedding of this model depends on each example's noise level, so there "
                                      "is no single W_U: unroll at one noise level, model.unroll(n_loops, t=0.5).")
        assert self.ada is not None
        shift, scale = self.ada(self._fixed())[0].chunk(2)
        return shift, scale
