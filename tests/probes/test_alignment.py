"""Aligned τ: maps that are known are found, the freedom is bounded, the model is left as it was."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from hooks import adopt
from probes.alignment import AlignConfig, align, independent_components
from probes.cycles import own_loops
from probes.exchange import Trajectory, exchange, tau

WIDTH, POS, PLACES = 12, 6, 4


class Turned(nn.Module):
    """One nonlinear map, the same at every loop, in a basis and with a clock that change from loop to loop."""

    def __init__(self, same: bool, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.turns = torch.stack([torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
                                  for _ in range(PLACES)])
        self.clocks = 6 * torch.randn(PLACES, WIDTH, generator=generator)
        self.weights = [torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH ** 0.5
                        for _ in range(1 if same else PLACES - 1)]
        self.marks = torch.randn(POS, WIDTH, generator=generator)
        self.b = Step(self)

    def forward(self, x):
        for _ in range(PLACES - 1):
            x = self.b(x)
        return self.read(x)

    def read(self, x):
        return 4 * ((x - self.clocks[-1]) @ self.turns[-1].T)[..., :3]

    def inputs(self, n, seed=1):
        noise = torch.randn(n, POS, WIDTH, generator=torch.Generator().manual_seed(seed))
        return (self.marks + noise) @ self.turns[0] + self.clocks[0]


class Step(nn.Module):
    def __init__(self, whole):
        super().__init__()
        self.whole = [whole]

    def forward(self, x):
        w = self.whole[0]
        place = torch.cdist(x.detach().mean(1), w.clocks[:-1]).argmin(-1)
        content = torch.einsum("npd,nkd->npk", x - w.clocks[place][:, None], w.turns[place])
        weights = torch.stack([w.weights[i % len(w.weights)] for i in range(PLACES - 1)])[place]
        made = w.marks + 2 * torch.tanh(content @ weights)
        return torch.einsum("npk,nkd->npd", made, w.turns[place + 1]) + w.clocks[place + 1][:, None]


def measured(same, n=64):
    module = Turned(same)
    model = adopt(module, layers=["b"], n_loops=PLACES - 1, readout=module.read)
    inputs = module.inputs(n)
    cycle = own_loops(model.topology())
    run = Trajectory.of(model, inputs, cycle)
    groups = torch.zeros(n, POS, dtype=torch.long)
    fit = torch.arange(0, n, 2)
    config = AlignConfig(starts=4, steps=30, tries=1, joint_steps=60, positions=2048)
    frame = align(run, fit=fit, groups=groups, config=config)
    scored = torch.ones(n, POS, dtype=torch.bool)
    plain = tau(exchange(model, inputs, cycle, trajectory=run, scored=scored)).values
    aligned = tau(exchange(model, inputs, cycle, trajectory=run, scored=scored, frame=frame)
                  .isel(example=slice(1, None, 2))).values
    return plain, aligned


def test_the_same_operation_in_a_basis_that_turns_is_found():
    plain, aligned = measured(same=True)
    off = ~np.eye(PLACES - 1, dtype=bool)
    assert plain[off].mean() < 0.4
    assert aligned[off].min() > 0.7
    assert aligned[off].mean() > 0.85
    assert np.allclose(np.diag(aligned), 1, atol=1e-4)


def test_maps_are_not_free_enough_to_do_the_work():
    _, aligned = measured(same=False)
    off = ~np.eye(PLACES - 1, dtype=bool)
    assert aligned[off].mean() < 0.4


def test_a_model_without_gradients_is_searched_and_left_alone():
    module = Turned(same=True)
    module.bias = nn.Parameter(torch.zeros(3))
    frozen = torch.no_grad()(module.b.forward)
    module.b.forward = frozen
    model = adopt(module, layers=["b"], n_loops=PLACES - 1, readout=module.read)
    run = Trajectory.of(model, module.inputs(32), own_loops(model.topology()))
    frame = align(run, fit=torch.arange(16), groups=torch.zeros(32, POS, dtype=torch.long),
                  config=AlignConfig(starts=4, tries=1))
    assert bool(torch.isfinite(frame.turns).all())
    assert module.bias.grad is None


def test_independent_components_are_found():
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (2000, 5), generator=generator) * 2.0 - 1
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q
    parts = independent_components(bits @ turn, generator)
    likeness = (parts @ turn.T).abs()
    assert likeness.amax(1).min() > 0.98
    assert sorted(likeness.argmax(1).tolist()) == [0, 1, 2, 3, 4]
