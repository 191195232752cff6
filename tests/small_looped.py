"""A small looped module of nobody's library, run by hand too, that the tests of `watch` share."""

from __future__ import annotations

import torch
from torch import nn

SCHEDULE = {"core": 4}


class Looped(nn.Module):
    """Prelude once, core layers ``n_loops`` times, coda once; ``idle`` is never called."""

    def __init__(self, n_loops: int = 4, width: int = 8):
        super().__init__()
        self.n_loops = n_loops
        self.prelude = nn.Linear(width, width)
        self.core = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.coda = nn.Linear(width, width)
        self.idle = nn.Linear(width, width)

    def forward(self, x, n_loops=None):
        x = self.prelude(x)
        for _ in range(n_loops or self.n_loops):
            for layer in self.core:
                x = torch.tanh(layer(x))
        return self.coda(x)


def by_hand(model, x, n_loops=4):
    seen = {"prelude.hook_out": model.prelude(x)}
    x = seen["prelude.hook_out"]
    for k in range(n_loops):
        for i, layer in enumerate(model.core):
            seen[f"core.{i}.hook_in@{k}"] = x
            x = seen[f"core.{i}.hook_out@{k}"] = layer(x)
            x = torch.tanh(x)
    seen["coda.hook_out"] = model.coda(x)
    return seen


class Wrapping(nn.Module):
    """Doubles its input and returns it wrapped up by a function."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, hidden_states):
        return self.wrap(hidden_states * 2)


def looped():
    torch.manual_seed(0)
    return Looped()


def states():
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def n_hooks(model):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
