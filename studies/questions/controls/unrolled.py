"""A loop in disguise: an unlooped model whose layers are copies of the loop.

Nothing in its configuration says that it iterates, and it does. A test that goes by the configuration is deceived.

    made = unrolled_copy(loop_model, n_loops=4)
    made(tokens)                                              # equals loop_model(tokens, 4) up to rounding
    stage_test(made, noised, targets=tokens, layers_per_loop=2)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooks import HookedLoopMDM, LoopMDMConfig
from hooks.plan import Pass


class DisguisedLoopMDM(HookedLoopMDM):
    """An unlooped LoopMDM whose mid layers are ``copies`` of a loop; what the loop adds to its input (injection, loop
    embedding) is added before the first layer of each copy."""

    embeds: Float[Tensor, "copy d_model"]

    def __init__(self, config: LoopMDMConfig, copies: int):
        super().__init__(config)
        self.copies = copies
        self.register_buffer("embeds", torch.zeros(copies, config.d_model), persistent=False)

    def loop(self, x: Float[Tensor, "batch pos d_model"], k: int, injected: Float[Tensor, "batch pos d_model"],
             condition: Float[Tensor, "batch d_cond"] | None = None, real: Bool[Tensor, "batch pos"] | None = None, *,
             step: Pass | None = None) -> Float[Tensor, "batch pos d_model"]:
        x = self.loop_input(x, k, injected, index=k)
        for layer in self._mid_layers() if step is None else step.layers:
            x = self._layers(self._before(layer, x, injected), (layer,), condition, real)
        return x

    def apply(self, depth: Any, state: Any = None, context: Any = None) -> Any:
        if not callable(depth) and 0 <= depth < context.topology.depth:
            layer, loop = context.topology.unrolled()[depth]
            if loop is not None:
                state = self._before(layer, state, context.injected)
        return super().apply(depth, state, context)

    def _before(self, layer: int, x: Tensor, injected: Tensor) -> Tensor:
        """The state with what a loop adds to it, where a copy begins; `loop_input` does the first."""
        copy, within = divmod(layer - self.config.n_head_layers, self.config.n_loop_layers // self.copies)
        if copy == 0 or within:
            return x
        return x + self.embeds[copy] + (injected if self.config.input_injection != "none" else 0.0)


@torch.no_grad()
def unrolled_copy(loop_model: HookedLoopMDM, n_loops: int | None = None) -> HookedLoopMDM:
    """``loop_model`` after ``n_loops`` loops (its own number by default) as an unlooped model; weights are copied.

    Raises ValueError for a number of loops that the model cannot run.
    """
    config, topology = loop_model.config, loop_model.topology(n_loops)
    period, n_loops = config.n_loop_layers, topology.n_loops
    made = DisguisedLoopMDM(replace(config, n_loop_layers=period * n_loops, max_loops=1), n_loops).eval()
    for name, value in loop_model.state_dict().items():
        if not name.startswith("blocks.") and name != "loop_embed.weight":
            made.get_parameter(name).copy_(value)
    if config.loop_embedding == "learned":
        rows = torch.arange(n_loops).clamp_max(config.max_loops - 1)
        made.embeds.copy_(loop_model.loop_embed.weight[rows])
        made.loop_embed.weight.copy_(made.embeds[:1])
    for depth, (layer, _) in enumerate(topology.unrolled()):
        made.blocks[depth].load_state_dict(loop_model.blocks[layer].state_dict())
    return made
