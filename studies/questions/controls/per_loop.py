"""Loops that have weights of their own: each loop's MLPs, or its attention, are drawn anew.

The rest of the block stays shared. Freshly drawn weights do nothing useful, so a few steps of training follow
(`studies.questions.controls.retraining`); each loop then does what its own weights have learned.

    made = per_loop_mlp(loop_model, n_loops=4, batches=task_batches(task), steps=200)
    half = per_loop_mlp(loop_model, n_loops=4, share=0.5)     # half of the neurons are the loop's own: a dial
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks import HookedLoopMDM
from hooks.model.layers import MLP, Attention
from studies.questions.controls.retraining import Batches, retrained
from studies.questions.controls.switched import Switched, own_gate, rewired


class Summed(nn.Module):
    """The sum of what two parts answer."""

    def __init__(self, shared: nn.Module, own: nn.Module):
        super().__init__()
        self.shared, self.own = shared, own

    def forward(self, x: Float[Tensor, "batch pos d_model"], *rest: object) -> Float[Tensor, "batch pos d_model"]:
        total: Tensor = self.shared(x, *rest) + self.own(x, *rest)
        return total


def per_loop_mlp(model: HookedLoopMDM, n_loops: int | None = None, *, share: float = 1.0, seed: int = 0,
                 batches: Batches | None = None, steps: int = 200) -> HookedLoopMDM:
    """A copy of ``model`` in which ``share`` of every looped layer's neurons are each loop's own, drawn anew.

    ``n_loops`` is the most that it can then run. With ``batches`` it is trained for ``steps`` steps. Raises ValueError
    for a share outside [0, 1].
    """
    return _per_loop(model, "mlp", n_loops, share, seed, batches, steps)


def per_loop_attention(model: HookedLoopMDM, n_loops: int | None = None, *, share: float = 1.0, seed: int = 0,
                       batches: Batches | None = None, steps: int = 200) -> HookedLoopMDM:
    """As `per_loop_mlp`, for the attention heads of every looped layer."""
    return _per_loop(model, "attn", n_loops, share, seed, batches, steps)


# ------------------------------------------------------------------------------ private

def _per_loop(model: HookedLoopMDM, part: str, n_loops: int | None, share: float, seed: int, batches: Batches | None,
              steps: int) -> HookedLoopMDM:
    if not 0 <= share <= 1:
        raise ValueError(f"share is the part of the weights that each loop has of its own, 0 to 1, not {share}.")
    made = copy.deepcopy(model)
    n_loops = made.topology(n_loops).n_loops
    generator = torch.Generator().manual_seed(seed)
    for layer in range(made.config.n_head_layers, made.config.n_head_layers + made.config.n_loop_layers):
        block = made.blocks[layer]
        whole = getattr(block, part)
        n_units = whole.n_heads if isinstance(whole, Attention) else whole.down.in_features
        order = torch.randperm(n_units, generator=generator)
        own, shared = order[:round(share * n_units)].sort().values, order[round(share * n_units):].sort().values
        if not len(own):
            continue
        groups = [_redrawn(_narrowed(whole, own), n_units, generator) for _ in range(n_loops)]
        switched = Switched(groups, own_gate(n_loops), made.clock)
        setattr(block, part, Summed(_narrowed(whole, shared), switched) if len(shared) else switched)
    if batches is not None:
        retrained(made, batches, steps=steps, n_loops=n_loops, seed=seed)
    return made


def _narrowed(part: nn.Module, units: Int[Tensor, "unit"]) -> nn.Module:
    """A copy of attention or MLP with some of its heads or neurons; what is added to all of them stays."""
    made = rewired(part, part)
    if isinstance(made, Attention):
        d_head = made.d_head
        rows = (units[:, None] * d_head + torch.arange(d_head)).flatten()
        width = made.qkv.in_features
        made.qkv = _cut(made.qkv, torch.cat([rows + third * width for third in range(3)]))
        made.out = _cut(made.out, columns=rows)
        made.n_heads = len(units)
        return made
    assert isinstance(made, MLP)
    made.up = _cut(made.up, torch.cat([units, units + made.down.in_features]) if made.gated else units)
    made.down = _cut(made.down, columns=units)
    return made


def _cut(linear: nn.Linear, rows: Int[Tensor, "row"] | None = None, columns: Int[Tensor, "column"] | None = None,
         ) -> nn.Linear:
    weight, bias = linear.weight.detach(), linear.bias
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else nn.Parameter(bias.detach()[rows].clone())
    if columns is not None:
        weight = weight[:, columns]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    made.weight = nn.Parameter(weight.clone())
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone())
    return made


@torch.no_grad()
def _redrawn(part: nn.Module, n_units: int, generator: torch.Generator) -> nn.Module:
    """Weights as an untrained model has them: normal, variance 1 / fan-in of the whole part, no biases."""
    for module in part.modules():
        if isinstance(module, nn.Linear):
            into = module is getattr(part, "up", None) or module is getattr(part, "qkv", None)
            fan_in = module.in_features if into else n_units * (module.in_features // max(1, _units(part)))
            module.weight.normal_(std=fan_in ** -0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
    return part


def _units(part: nn.Module) -> int:
    if isinstance(part, Attention):
        return part.n_heads
    assert isinstance(part, MLP)
    return part.down.in_features
