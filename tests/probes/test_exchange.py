"""Exchange of operations on programmes that are written into the block, so that every number is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooks import HookedLoopMDM
from probes.calibration import calibrated
from probes.cycles import own_loops, pseudo_loops
from probes.exchange import Clocks, Trajectory, exchange, group_of, tau
from tests.small import small_config, small_model, small_tokens
from tests.small_planned import examples, planned


def exchanged(sequence, n=96, **options):
    model = planned(sequence)
    inputs, targets = examples(sequence, n)
    return exchange(model, inputs, own_loops(model.topology()), scored=torch.ones_like(targets, dtype=torch.bool),
                    **options)


@pytest.mark.parametrize("sequence", ["AAAA", "ABCA", "AABB", "ABAB"])
def test_tau_reads_the_programme_off(sequence):
    value = tau(exchanged(sequence)).values
    letters = np.array(list(sequence))
    same = letters[:, None] == letters[None]
    assert value[same].min() > 0.95
    assert not (np.minimum(value, value.T)[~same] >= 0.15).any()
    assert np.diag(value) == pytest.approx(1, abs=1e-5)


def test_a_loop_that_does_nothing_has_no_work():
    found = exchanged("AIBA")
    work = found.work.mean("example").values
    assert work[1] == pytest.approx(0, abs=1e-3)
    assert work[[0, 2, 3]].min() > 0.3


def test_exchange_equals_its_definition_carried_out_by_hand():
    model = small_model(n_loop_layers=1, n_head_layers=1, n_tail_layers=1, seed=3)
    tokens = small_tokens(6)
    cycle = own_loops(model.topology(3))
    run = Trajectory.of(model, tokens, cycle)
    scored = model.scored(tokens)
    clocks = Clocks.of(run, group_of(scored.long(), "role"))
    every = torch.arange(6)
    k, j = 0, 2
    h, role = run.states, scored.long()

    def clock(state, example, r):    # six examples, six folds: all others
        rows = [e for e in range(6) if e != example]
        points = torch.cat([state[e][role[e] == r] for e in rows])
        return points.mean(0), (points - points.mean(0)).square().mean().sqrt()

    def moved(state, source, to):
        out = torch.empty_like(state)
        for e in range(6):
            for r in (0, 1):
                (m0, s0), (m1, s1) = clock(source, e, r), clock(to, e, r)
                out[e][role[e] == r] = m1 + s1 * (state[e][role[e] == r] - m0) / s0
        return out

    with torch.no_grad():
        torch.testing.assert_close(clocks.carry(h[k], k, j, every), moved(h[k], h[k], h[j]), atol=1e-5, rtol=1e-4)
        z = run.operate(j, clocks.carry(h[k], k, j, every), every)
        clocks.meet(k, [j], [z])
        torch.testing.assert_close(clocks.carry_back(z, k, j, every), moved(z, z, h[k + 1]), atol=1e-5, rtol=1e-4)


def test_kl_and_work_are_those_of_runs_that_go_on_from_the_next_place():
    model = small_model(n_loop_layers=2, loop_embedding="learned", seed=4)   # a loop run twice would be seen
    tokens, every = small_tokens(8), torch.arange(8)
    cycle = own_loops(model.topology(3))
    scored = model.scored(tokens)
    found = exchange(model, tokens, cycle)
    run = Trajectory.of(model, tokens, cycle)
    clocks = Clocks.of(run, group_of(scored.long(), "role"))
    clean = model(tokens, n_loops=3)[scored].float()
    example = torch.nonzero(scored)[:, 0]
    half = example % 2 == 1
    wanted = clean.softmax(-1)

    def by_example(depth, state):
        other = model.resume(depth, state, run.context)[scored].float()
        extra = calibrated(other, wanted, half) - calibrated(clean, wanted, half)
        return [float(extra[example == e].mean()) for e in range(8)]

    with torch.no_grad():
        for k, j in ((0, 1), (0, 2), (1, 0)):
            after = cycle.depths[k + 1][0]
            np.testing.assert_allclose(by_example(after, clocks.carry(run.states[k], k, k + 1, every)),
                                       found.work.values[k], atol=5e-4)
            z = clocks.carry(run.states[k], k, j, every)
            for depth in cycle.depths[j]:
                z = model.apply(depth, z, run.context)
            clocks.meet(k, [j], [z])
            np.testing.assert_allclose(by_example(after, clocks.carry_back(z, k, j, every)), found.kl.values[k, j],
                                       atol=5e-4)


def test_the_clock_of_an_example_is_set_by_others():
    model = planned("AAB")
    inputs, _ = examples("AAB", 16)
    cycle = own_loops(model.topology())
    run = Trajectory.of(model, inputs, cycle)
    other = inputs.clone()
    other[3] += 5.0
    groups = torch.zeros(16, 1, dtype=torch.long)
    changed = Clocks.of(Trajectory.of(model, other, cycle), groups)
    fold = 3 % 8
    before = Clocks.of(run, groups)
    assert torch.equal(before.means[fold, 0], changed.means[fold, 0])
    assert not torch.equal(before.means[fold - 1, 0], changed.means[fold - 1, 0])


def test_content_of_another_example_does_no_work():
    found = exchanged("AAAA", shuffle=1)
    value = 1 - found.kl.mean("example") / exchanged("AAAA").work.mean("example")
    assert float(value.max()) < 0.15


def test_chunks_and_pairs_change_nothing():
    whole = exchanged("ABAB", n=20)
    chunked = exchanged("ABAB", n=20, rows=7)
    np.testing.assert_allclose(whole.kl, chunked.kl, atol=1e-5)
    pairs = np.zeros((4, 4), dtype=bool)
    pairs[1, 3] = True
    some = exchanged("ABAB", n=20, pairs=pairs)
    np.testing.assert_allclose(some.kl[1, 3], whole.kl[1, 3], atol=1e-5)
    assert np.isfinite(some.kl).sum() == 20
    assert np.isfinite(some.work).sum() == 20


def test_a_loop_and_its_unrolled_copy_get_the_same_matrix():
    loop = small_model(n_loop_layers=2, max_loops=3, seed=5)
    config = loop.config
    deep = HookedLoopMDM(small_config(n_loop_layers=6, max_loops=1)).eval()
    state = {}
    n_head, n_mid = config.n_head_layers, config.n_loop_layers
    for key, value in loop.state_dict().items():
        part = key.split(".")
        if part[0] != "blocks":
            state[key] = value
            continue
        layer = int(part[1])
        targets = ([layer] if layer < n_head else [layer + 2 * n_mid] if layer >= n_head + n_mid else
                   [layer + n_mid * copy for copy in range(3)])
        state |= {".".join(["blocks", str(target), *part[2:]]): value for target in targets}
    deep.load_state_dict(state)
    tokens = small_tokens(12)
    for maps in ("loop", "layer"):
        one = tau(exchange(loop, tokens, own_loops(loop.topology(3)), maps=maps))
        other = tau(exchange(deep, tokens, pseudo_loops(deep.topology(1), 2), maps=maps))
        np.testing.assert_allclose(one, other, atol=1e-4)



@pytest.mark.unchecked
def test_what_cannot_be_exchanged_is_refused():
    model = planned("AB")
    inputs, targets = examples("AB", 8)
    cycle = own_loops(model.topology())
    scored = torch.ones_like(targets, dtype=torch.bool)
    with pytest.raises(ValueError, match="scored has shape"):
        exchange(model, inputs, cycle, scored=scored[:, :2])
    with pytest.raises(ValueError, match="no position is scored"):
        exchange(model, inputs, cycle, scored=~scored)
    with pytest.raises(ValueError, match="clock must be one of"):
        exchange(model, inputs, cycle, scored=scored, clock="none")
    with pytest.raises(ValueError, match="maps must be one of"):
        exchange(model, inputs, cycle, scored=scored, maps="head")
    with pytest.raises(ValueError, match="not finite"):
        exchange(small_broken(), small_tokens(4), own_loops(small_broken().topology(2)))
    with pytest.raises(ValueError, match="at least two examples"):
        exchange(model, inputs[:1], cycle, scored=scored[:1])


def small_broken():
    model = small_model(n_loop_layers=1, seed=1)
    with torch.no_grad():
        next(model.blocks[1].parameters()).fill_(float("nan"))
    return model
