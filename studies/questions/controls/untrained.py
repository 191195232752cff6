"""Untrained models of several shapes: whatever their loops do, there is nothing to explain.

    model = untrained("two layers", seed=3, task=task)
    stage_test(model, noised, targets=clean, scored=noised == task.mask_token_id)

All take tokens of a task and answer in its vocabulary. Their unembedding is random, so that their loops change the
answer as much as those of an untrained model can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from hooks import HookedLoopMDM, LoopedModel, LoopMDMConfig, adopt
from studies.tasks import Task

Shape = Callable[[Task, torch.Generator], LoopedModel]


class LoopedTokens(nn.Module):
    """Tokens → embedding → one layer, ``n_loops`` times → unembedding, around a layer of any make."""

    def __init__(self, task: Task, layer: nn.Module, width: int, n_loops: int):
        super().__init__()
        self.embed, self.where = nn.Embedding(task.vocab_size, width), nn.Embedding(task.seq_len, width)
        self.layer, self.n_loops = layer, n_loops
        self.norm, self.unembed = nn.LayerNorm(width), nn.Linear(width, task.vocab_size)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos vocab"]:
        x = self.embed(tokens) + self.where.weight[:tokens.shape[1]]
        for _ in range(self.n_loops):
            x = self.layer(x)
        logits: Tensor = self.unembed(self.norm(x))
        return logits


class Mixer(nn.Module):
    """x + MLP over positions, x + MLP over features, no attention (2105.01601)."""

    def __init__(self, width: int, pos: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.over_pos = nn.Sequential(nn.Linear(pos, 2 * pos), nn.GELU(), nn.Linear(2 * pos, pos))
        self.over_width = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        x = x + self.over_pos(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        mixed: Tensor = x + self.over_width(self.norms[1](x))
        return mixed


class Recurrent(nn.Module):
    """tanh(W x + its neighbours'), without a residual stream."""

    def __init__(self, width: int):
        super().__init__()
        self.own, self.left = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return torch.tanh(self.own(x) + self.left(x.roll(1, 1)))


def _loopmdm(**settings: Any) -> Shape:
    def make(task: Task, generator: torch.Generator) -> LoopedModel:
        shape = {"d_model": 32, "n_heads": 4, "d_mlp": 96, "max_loops": 4, **settings}
        model = HookedLoopMDM(LoopMDMConfig(vocab_size=task.vocab_size, mask_token_id=task.mask_token_id,
                                            max_seq_len=task.seq_len, **shape))
        model.reset_parameters(generator)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "unembed_weight" in name:
                    parameter.normal_(std=shape["d_model"] ** -0.5, generator=generator)
                elif "loop_embed" in name or "injection_gate" in name:
                    parameter.normal_(generator=generator)
        return model.eval()

    return make


def _foreign(layer: Callable[[int, Task], nn.Module]) -> Shape:
    def make(task: Task, generator: torch.Generator) -> LoopedModel:
        module = LoopedTokens(task, layer(32, task), 32, n_loops=4)
        with torch.no_grad():
            for module_name, parameter in module.named_parameters():
                if parameter.ndim > 1:
                    fan_in = 1 if module_name.startswith(("embed", "where")) else parameter.shape[1]
                    parameter.normal_(std=fan_in ** -0.5, generator=generator)
                elif module_name.endswith("bias"):
                    parameter.zero_()
        return adopt(module.eval().requires_grad_(False), layers=["layer"], n_loops=4,
                     readout=lambda x: module.unembed(module.norm(x)))

    return make


SHAPES: Mapping[str, Shape] = MappingProxyType({
    "two layers": _loopmdm(),
    "one layer, nothing around it": _loopmdm(n_head_layers=0, n_loop_layers=1, n_tail_layers=0, norm="layer"),
    "four layers, input injected": _loopmdm(n_loop_layers=4, input_injection="head", mlp="swiglu"),
    "loop embedding": _loopmdm(loop_embedding="learned", position="learned", qk_norm=False),
    "post-norm encoder": _foreign(lambda width, _: nn.TransformerEncoderLayer(
        width, 4, 3 * width, dropout=0.0, activation=F.gelu, batch_first=True)),
    "mixer": _foreign(lambda width, task: Mixer(width, task.seq_len)),
    "recurrent": _foreign(lambda width, _: Recurrent(width)),
})
"""The shapes, by name; all run four loops."""


def untrained(shape: str, seed: int = 0, *, task: Task) -> LoopedModel:
    """A model of one of `SHAPES` with random weights, for tokens of ``task``. ValueError for an unknown shape."""
    if shape not in SHAPES:
        raise ValueError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}.")
    return SHAPES[shape](task, torch.Generator().manual_seed(seed))
