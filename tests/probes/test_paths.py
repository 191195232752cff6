"""Paths between loops and single heads: against forwards by hand, planted, and what each model can give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hooks import Unavailable, adopt
from probes.answers import Judge
from probes.batching import derangement
from probes.paths import head_scan, path_effects
from tests.small import MASK, small_model
from tests.specimens import SPECIMENS

LOOPS = 3


def given():
    clean = torch.randint(0, MASK, (6, 8), generator=torch.Generator().manual_seed(3))
    return small_model(seed=2), torch.where(torch.arange(8) % 2 == 0, MASK, clean), clean


@pytest.mark.parametrize("how", ["zero", "mean"])
@torch.no_grad()
def test_paths_are_forwards_by_hand(how: str) -> None:
    model, noised, clean = given()
    found = path_effects(model, noised, targets=clean, how=how, n_loops=LOOPS)
    states, logits, context = model.run(noised, LOOPS)
    judge, every = Judge(logits, clean, noised == MASK), torch.arange(6)
    loops, own = context.topology.loop_depths(), judge(logits, every)[0]
    entry = states[loops[0][0]]
    updates = [states[d[-1] + 1] - states[d[0]] for d in loops]
    for i in range(LOOPS):
        gone = updates[i] - (updates[i].mean(0, keepdim=True) if how == "mean" else 0)
        for j in range(i + 1, LOOPS):
            reads = states[loops[j][0]] - gone
            new = model.walk(reads, context, loops[j][0], loops[j][-1] + 1) - reads
            end = entry + sum(u for k, u in enumerate(updates) if k != j) + new
            np.testing.assert_allclose(found.nll[i, j], judge(model.coda(end, context), every)[0] - own, atol=2e-5)
        direct = judge(model.coda(entry + sum(updates) - gone, context), every)[0] - own
        np.testing.assert_allclose(found.nll.sel(receiver="answer")[i], direct, atol=2e-5)
    assert np.isnan(found.nll.values[np.tril_indices(LOOPS)]).all()
    assert np.isfinite(found.nll.values[np.triu_indices(LOOPS, 1)]).all()


class Relay(nn.Module):
    """A shift register: loop 0 moves a token's number to the second place, loop 1 from there to the third."""

    def __init__(self):
        super().__init__()
        self.embed, self.b = nn.Embedding(3, 9), Shift()
        self.embed.weight.data = torch.cat([torch.eye(3), torch.zeros(3, 6)], 1)

    def forward(self, tokens):
        return third(self.b(self.b(self.embed(tokens))))


class Shift(nn.Module):
    def forward(self, x):
        return torch.cat([x[..., :3], x[..., :6]], -1)


def third(x):
    return 9 * x[..., 6:]


def test_a_planted_relay_is_found_on_its_one_path() -> None:
    model = adopt(Relay(), layers=["b"], n_loops=2, readout=third)
    tokens = torch.randint(0, 3, (6, 4), generator=torch.Generator().manual_seed(1))
    found = path_effects(model, tokens, targets=tokens, scored=torch.ones_like(tokens, dtype=torch.bool))
    effect = found.nll.mean("example")
    assert float(effect.sel(sender=0, receiver="1")) > 1              # what loop 0 wrote, loop 1 carries on
    assert float(effect.sel(sender=1, receiver="answer")) > 1
    np.testing.assert_allclose(effect.sel(sender=0, receiver="answer"), 0, atol=1e-6)     # and nobody else looks at it


@pytest.mark.parametrize("how", ["zero", "mean", "resample"])
@torch.no_grad()
def test_heads_are_edits_by_hand(how: str) -> None:
    model, noised, clean = given()
    found = head_scan(model, noised, targets=clean, how=how, n_loops=LOOPS)
    logits = model(noised, LOOPS)
    judge, every = Judge(logits, clean, noised == MASK), torch.arange(6)
    topology = model.topology(LOOPS)
    assert found.nll.shape == (topology.depth, 2, 6)
    for depth, head in ((0, 0), (2, 1), (topology.depth - 1, 0)):
        def edit(z, hook, head=head):
            z = z.clone()
            z[:, :, head] = {"zero": torch.zeros_like(z), "mean": z.mean(0, keepdim=True).expand_as(z),
                             "resample": z[derangement(6, 0)]}[how][:, :, head]
            return z
        with model.hooks([(topology.site_at(depth, "attn.hook_z"), edit)], n_loops=LOOPS):
            changed = model(noised, LOOPS)
        worse = judge(changed, every)[0] - judge(logits, every)[0]
        np.testing.assert_allclose(found.nll.sel(depth=depth, head=head), worse, atol=2e-5)
    assert not np.allclose(found.nll, 0, atol=1e-4)


@pytest.mark.parametrize("name", list(SPECIMENS))
def test_every_looped_model_has_paths_and_says_whether_it_has_heads(name: str) -> None:
    specimen = SPECIMENS[name]()
    found = path_effects(specimen.model, specimen.inputs, targets=specimen.targets, n_loops=specimen.n_loops)
    assert np.isfinite(found.nll.sel(receiver="answer").mean("example")).all()
    if name == "loopmdm":
        assert np.isfinite(head_scan(specimen.model, specimen.inputs, targets=specimen.targets,
                                     n_loops=specimen.n_loops).kl.mean("example")).all()
    elif name != "bridge":
        with pytest.raises(Unavailable, match=r"no site attn\.hook_z"):
            head_scan(specimen.model, specimen.inputs, targets=specimen.targets, n_loops=specimen.n_loops)


@pytest.mark.unchecked
def test_what_cannot_be_told_is_refused() -> None:
    model, noised, clean = given()
    with pytest.raises(ValueError, match="how must be zero or mean"):
        path_effects(model, noised, targets=clean, how="resample")
    with pytest.raises(ValueError, match="how must be zero, mean or resample"):
        head_scan(model, noised, targets=clean, how="freeze")
    with pytest.raises(ValueError, match="mean takes what a loop adds for other examples"):
        path_effects(model, noised[:1], targets=clean[:1], how="mean", n_loops=2)
