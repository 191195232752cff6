"""A gated copy: a looped block that computes exactly what an unlooped model computes.

Its layers hold the attention heads and the MLP neurons of all layers that it stands for, and the loop index switches
them: the weights are shared over the loops, and no two loops run the same ones. Its truth is that of the unlooped
model, to every digit; a test of shared weights calls it iterating.

    made = gated_copy(deep_twin, layers_per_loop=2)
    made(tokens)                                              # equals deep_twin(tokens) up to rounding
    stage_test(made, noised, targets=tokens)                  # equals stage_test(deep_twin, …, layers_per_loop=2)

The dial ``leak`` opens all groups a little at every loop: at 0 no two loops run the same weights, at 1 all run one map,
the mean of all. That map does not solve the task any more, and nothing forces its loops to be exchangeable.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks import HookedLoopMDM
from studies.questions.controls.switched import Switched, own_gate, rewired


class GatedLoopMDM(HookedLoopMDM):
    """A LoopMDM that is given its injected input once, when the loop is entered, as an unlooped model is."""

    def loop_input(self, x: Float[Tensor, "batch pos d_model"], k: int, injected: Float[Tensor, "batch pos d_model"], *,
                   index: int) -> Float[Tensor, "batch pos d_model"]:
        return super().loop_input(x, k, injected if index == 0 else torch.zeros_like(injected), index=index)


class Scaled(nn.Module):
    """A group of heads or neurons with the scale of the norm that it reads through."""

    def __init__(self, scale: Float[Tensor, "d_model"], part: nn.Module):
        super().__init__()
        self.scale, self.part = nn.Parameter(scale.detach().clone()), part

    def forward(self, x: Float[Tensor, "batch pos d_model"], *rest: object) -> Float[Tensor, "batch pos d_model"]:
        made: Tensor = self.part(x * self.scale, *rest)
        return made


@torch.no_grad()
def gated_copy(deep_twin: HookedLoopMDM, layers_per_loop: int = 2, *, leak: float = 0.0) -> HookedLoopMDM:
    """``deep_twin`` as a looped block of ``layers_per_loop`` layers, run once per pseudo-loop; weights are copied.

    Mid layers that are left over come after the loop, as in `probes.cycles.pseudo_loops`. Logits equal those of the
    twin to 1e-5 at ``leak`` 0. Raises ValueError for a model that loops or is conditioned on time, or that has fewer
    than two pseudo-loops.
    """
    config = deep_twin.config
    if config.max_loops != 1:
        raise ValueError(f"{deep_twin.name} loops (max_loops {config.max_loops}): a gated copy is made of an unlooped "
                         "model; unrolled_copy makes one.")
    if config.conditioned:
        raise ValueError(f"{deep_twin.name} is conditioned on time, whose scales are not switched: take a model with "
                         "time_conditioning='none'.")
    n_loops, left = divmod(config.n_loop_layers, layers_per_loop)
    if n_loops < 2:
        raise ValueError(f"{config.n_loop_layers} mid layers give {n_loops} loops of {layers_per_loop}; a gated copy "
                         "needs at least two.")
    made = GatedLoopMDM(replace(config, n_loop_layers=layers_per_loop, max_loops=n_loops,
                                n_tail_layers=config.n_tail_layers + left)).eval()
    start, n_switched = config.n_head_layers, n_loops * layers_per_loop
    for name, value in deep_twin.state_dict().items():
        if not name.startswith("blocks.") and name != "loop_embed.weight":
            made.get_parameter(name).copy_(value)
    if config.loop_embedding == "learned":
        made.loop_embed.weight[0] = deep_twin.loop_embed.weight[0]      # the others are zero
    for layer in range(config.n_layers):
        if start <= layer < start + n_switched:
            continue
        target = layer if layer < start else layer - n_switched + layers_per_loop
        made.blocks[target].load_state_dict(deep_twin.blocks[layer].state_dict())
    gate = own_gate(n_loops, leak)
    for layer in range(layers_per_loop):
        block = made.blocks[start + layer]
        originals = [deep_twin.blocks[start + k * layers_per_loop + layer] for k in range(n_loops)]
        for part, norm in (("attn", "ln1"), ("mlp", "ln2")):
            groups = [Scaled(getattr(original, norm).weight, rewired(getattr(original, part), getattr(block, part)))
                      for original in originals]
            setattr(block, part, Switched(groups, gate, made.clock))
            getattr(block, norm).weight.fill_(1.0)
    return made
