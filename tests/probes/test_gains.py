"""What each loop adds to the answer, against the same runs carried out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes import gains
from probes.calibration import calibrated
from probes.cycles import own_loops
from probes.exchange import Clocks, Trajectory, group_of
from tests.small import small_model, small_tokens

LOOPS = 4


@pytest.fixture(scope="module")
def measured():
    """A model whose loops differ, its gains, and how the NLL of a state that enters a depth is read by hand."""
    model = small_model(n_loop_layers=2, loop_embedding="learned", seed=6)
    tokens = small_tokens(10)
    targets = torch.randint(0, 6, tokens.shape, generator=torch.Generator().manual_seed(1))
    cycle = own_loops(model.topology(LOOPS))
    found = gains(model, tokens, cycle, targets=targets)
    run = Trajectory.of(model, tokens, cycle)
    scored = model.scored(tokens)
    wanted = torch.nn.functional.one_hot(targets[scored], model.config.vocab_size).float()

    def nll(depth, state):
        logits = model.resume(depth, state, run.context)[scored].float()
        return calibrated(logits, wanted, torch.nonzero(scored)[:, 0] % 2 == 1)

    def looped(state, loops):
        for k in loops:
            for depth in cycle.depths[k]:
                state = model.apply(depth, state, run.context)
        return state

    return found, run, cycle, scored, nll, looped


def read(values, scored):
    return values.values[scored.numpy()]


@torch.no_grad()
@pytest.mark.parametrize("k", range(LOOPS + 1))
def test_prefix_repeat_and_suffix_run_the_loops_that_they_name(measured, k):
    found, run, cycle, scored, nll, looped = measured
    start = run.states[0]
    for name, loops in (("prefix", range(k)), ("repeat", [0] * k), ("suffix", range(LOOPS - k, LOOPS))):
        np.testing.assert_allclose(read(found[name][k], scored), nll(cycle.stop, looped(start, loops)), atol=1e-4,
                                   err_msg=name)


@torch.no_grad()
def test_the_line_goes_through_the_states_after_loops_1_and_2(measured):
    found, run, cycle, scored, nll, looped = measured
    first, second = (looped(run.states[0], range(k)) for k in (1, 2))
    assert found.line.isel(loops=slice(0, 3)).isnull().all()
    for k in (3, 4):
        np.testing.assert_allclose(read(found.line[k], scored),
                                   nll(cycle.stop, first + (k - 1) * (second - first)), atol=1e-4)


@torch.no_grad()
def test_skip_moves_the_clock_on_and_goes_on_from_the_next_loop(measured):
    found, run, cycle, scored, nll, _ = measured
    clocks = Clocks.of(run, group_of(scored.long(), "role"))
    for k in range(LOOPS - 1):
        state = clocks.carry(run.states[k], k, k + 1, torch.arange(10))
        np.testing.assert_allclose(read(found.skip[k], scored), nll(cycle.depths[k + 1][0], state), atol=1e-4)


def test_the_prior_is_the_frequency_in_the_other_half(measured):
    found, _, _, scored, _, _ = measured
    assert bool(np.isfinite(read(found.prior, scored)).all())
    assert bool(found.prior.isnull().values[~scored.numpy()].all())
