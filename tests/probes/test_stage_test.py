"""The stage test on planted programmes, and its rule on planted numbers, a branch at a time."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from probes import stage_test
from probes.intervals import Claims, p_above
from probes.stage_rule import Evidence, Exchanges, Layers, judge
from probes.thresholds import THRESHOLDS
from tests.small import small_model, small_tokens
from tests.small_planned import examples, planned

QUICK = replace(THRESHOLDS, resamples=2000)


def verdict(sequence, n=48, **options):
    inputs, targets = examples(sequence, n)
    return stage_test(planned(sequence), inputs, targets=targets, thresholds=QUICK, **options)


# ---------------------------------------------------------------- whole calls

@pytest.mark.parametrize(("sequence", "regime"), [("AA", "iterating"), ("AAAA", "iterating"), ("AAB", "programme"),
                                                  ("ABAB", "programme"), ("ABBB", "iterating")])
def test_programmes_are_read_off(sequence, regime):
    found = verdict(sequence)
    assert (found.regime, found.letters, found.basis) == (regime, sequence, "fixed")


def test_a_verdict_says_what_it_measured():
    found = verdict("AAAA")
    assert found.tau.dims == ("content", "operation")
    assert found.tau.shape == (4, 4)
    assert found.stages.loop.values.tolist() == [0, 1, 2, 3]
    assert found.findings[0].stages == "one layer"
    table = found.table
    assert list(table["regime"]) == ["iterating"]
    assert table["tau_decision"].item() == "above"
    assert table["tau_low"].item() <= table["tau"].item() <= table["tau_high"].item()
    assert "repeat one operation" in found.text
    assert "this model" in found.text
    assert f"{found.findings[0].quantities['tau'].interval.value:.0%}" in found.text
    assert json.loads(json.dumps(found.to_dict()))["letters"] == "AAAA"
    assert str(found) == found.text
    assert found.to_dict() == verdict("AAAA").to_dict()


def test_an_untrained_model_is_nothing_to_explain():
    model = small_model(n_loop_layers=1, seed=2)
    tokens = small_tokens(48, seed=3)
    clean = torch.randint(0, 6, tokens.shape, generator=torch.Generator().manual_seed(4))
    found = stage_test(model, tokens, targets=clean, n_loops=3, thresholds=QUICK)
    assert found.regime in ("nothing", "undecided")


def test_seeds_are_pooled_and_named():
    inputs, targets = examples("AA", 32)
    found = stage_test([planned("AA"), planned("AA")], inputs, targets=targets, thresholds=QUICK)
    assert found.regime == "iterating"
    assert found.n_seeds == 2
    assert "these 2 models" in found.text
    with pytest.raises(ValueError, match="same number of loops"):
        stage_test([planned("AA"), planned("AAB")], inputs, targets=targets)


@pytest.mark.parametrize("t", [float("nan"), 0.0, -1.0, 7.0, torch.tensor([0.5, 2.0] * 8)])
def test_what_is_no_noise_level_is_refused(t):
    with pytest.raises(ValueError, match="lies in"):
        verdict("AA", n=16, t=t)


@pytest.mark.unchecked
def test_arguments_that_do_not_fit_are_refused():
    inputs, targets = examples("AA", 16)
    model = planned("AA")
    with pytest.raises(ValueError, match="at least 2"):
        stage_test(small_model(), small_tokens(8), targets=torch.zeros(8, 9, dtype=torch.long), n_loops=1)
    with pytest.raises(ValueError, match="no range"):
        stage_test(model, inputs, targets=targets, loop_ranges=[(1, 5)])
    with pytest.raises(ValueError, match="no position is scored"):
        stage_test(model, inputs, targets=-torch.ones_like(targets))
    with pytest.raises(ValueError, match="at least two examples"):
        stage_test(model, inputs[:1], targets=targets[:1])
    with pytest.raises(ValueError, match="whole numbers"):
        stage_test(model, inputs, targets=targets.float())
    with pytest.raises(ValueError, match="no model"):
        stage_test([], inputs, targets=targets)


def test_few_examples_decide_nothing():
    found = verdict("AA", n=6)
    assert found.regime == "undecided"
    assert "too few" in found.findings[0].reason


# -------------------------------------------------------------- the rule alone

N = 60


def noisy(value, shape=(), spread=0.02, seed=0):
    rng = np.random.default_rng(seed)
    return np.asarray(value)[..., None] + spread * rng.normal(size=(*np.shape(value), N))


def evidence(tau, *, work=0.5, gain=0.1, worth=0.1, loops=(1, 4), aligned=None, first=1.0, line=2.0, layers=None,
             n=None, start=0.3):
    """Evidence of a run of four loops: ``tau`` by pair; ``start`` is what loop 0 gains, ``gain`` each later one."""
    tau = np.asarray(tau, dtype=float)
    k = len(tau)
    works = np.broadcast_to(np.asarray(work, dtype=float), (k,))
    prefix = np.array([first, *(first - start - gain * i for i in range(k))])
    found = Evidence(
        role="scored", band="any", sizes=(N,), ranges=(loops,),
        loops=Exchanges(noisy(works[:, None] * (1 - tau), spread=0.002), noisy(works, spread=0.002)),
        prefix=noisy(prefix, spread=0.002), skip=noisy(prefix[-1] + np.full(k, worth), spread=0.002),
        line=np.where(np.arange(k + 1)[:, None] > 2, noisy(np.full(k + 1, line), spread=0.002), np.nan),
        aligned=None if aligned is None else Exchanges(noisy(works[:, None] * (1 - np.asarray(aligned)), spread=0.002),
                                                       noisy(works, spread=0.002)),
        layers=layers)
    return found if n is None else replace(found, sizes=(n,))


def matrix(letters, same=0.9, other=-0.5):
    letters = np.array(list(letters))
    value = np.where(letters[:, None] == letters[None], same, other)
    np.fill_diagonal(value, 1.0)
    return value


def ruled(*args, **options):
    return judge([evidence(*args, **options)], thresholds=QUICK)[0]


def test_the_rule_names_each_regime():
    assert ruled(matrix("BAAA")).regime == "iterating"
    assert ruled(matrix("ABCD")).regime == "unrolled"
    assert ruled(matrix("CABA")).regime == "programme"
    assert ruled(matrix("BAAA"), gain=0, worth=0, start=0.4).regime == "settled"
    assert ruled(matrix("BAAA"), work=[0.5, 0, 0, 0], gain=0, worth=0).regime == "settled"
    assert ruled(matrix("BAAA"), work=0, gain=0, worth=0, start=0).regime == "nothing"
    assert ruled(matrix("BAAA", same=0.4, other=0.4)).regime == "undecided"


def test_drifting_needs_loops_that_change_the_answer_after_a_gain():
    """Loops 2 and 3 change the answer, loop 1 improved it."""
    found = evidence(matrix("ABCD"), loops=(2, 4), gain=0.0, worth=0.0)
    prefix = found.prefix.copy()
    prefix[2:] -= 0.3
    found = replace(found, prefix=prefix, skip=np.broadcast_to(prefix[-1], (4, N)).copy())
    assert judge([found], thresholds=QUICK)[0].regime == "drifting"


def test_what_never_improved_has_not_settled():
    """An untrained model whose first loop does harm that later ones undo: not decidedly without a gain."""
    found = evidence(matrix("AAAA"), gain=0.0, worth=0.0, start=-0.02)
    undone = found.prefix.copy()
    undone[1] = undone[-1] + np.where(np.arange(N) % 2, 0.06, -0.05)
    made = judge([replace(found, prefix=undone)], thresholds=QUICK)[0]
    assert made.regime == "undecided"
    assert "whether any loop improved the answer" in made.reason


def test_loops_that_improve_the_answer_only_together_are_not_decided():
    """Each of them can be left out, as the others make up for it."""
    found = ruled(matrix("BAAA"), work=[0.5, 0, 0, 0], gain=0.1, worth=0)
    assert (found.regime, found.idle) == ("undecided", True)
    assert "together" in found.reason


def test_means_are_weighted_by_the_work_that_is_replaced():
    """Loop 1 does nearly all of the work, and any loop can do it; what loops 2 and 3 do, no other can."""
    tau = matrix("BAAA", same=0.05)
    tau[1, 2:] = 0.95
    found = ruled(tau, work=[0.5, 2.0, 0.1, 0.1])
    assert found.quantities["tau"].interval.value == pytest.approx((2 * 0.95 * 2.0 + 4 * 0.05 * 0.1) / 4.4, abs=0.01)
    assert found.regime == "undecided", "no pair exchanges both ways, yet most of the work can be exchanged"


def test_exchanges_and_work_are_resampled_together():
    """Work differs tenfold between examples and τ is .6 in each of them: τ of every draw is .6."""
    found = evidence(matrix("BAAA", same=0.6))
    work = np.broadcast_to(np.exp(1.2 * np.random.default_rng(0).normal(size=N)), (4, N)).copy()
    kl = work[:, None] * (1 - matrix("BAAA", same=0.6))[..., None]
    made = judge([replace(found, loops=Exchanges(kl, work))], thresholds=QUICK)[0]
    interval = made.quantities["tau"].interval
    assert (interval.low, interval.high) == pytest.approx((0.6, 0.6), abs=1e-6)
    assert made.regime == "iterating"


def test_a_claim_pays_for_every_side_that_it_tries():
    draws = np.linspace(-0.03, 0.97, 1000)
    one, both = Claims(0.05), Claims(0.05)
    one.add(("gain",), draws, above=0.0)
    both.add(("gain",), draws, above=0.0, below=0.0)
    for claims in (one, both):
        claims.settle()
    assert one.p(("gain",)) == pytest.approx(p_above(draws, 0.0))
    assert both.p(("gain",)) == pytest.approx(2 * p_above(draws, 0.0))
    assert (one.side(("gain",)), both.side(("gain",))) == ("above", "")


def test_letters_keep_loop_0_apart_and_name_the_idle():
    assert ruled(matrix("BAAA")).letters == "ABBB"
    assert ruled(matrix("AAAA")).letters == "AAAA"
    assert ruled(matrix("ABCD")).letters == "ABCD"
    assert ruled(matrix("AABB")).letters == "AABB"
    assert ruled(matrix("AABB")).regime == "programme"
    assert ruled(matrix("BAAA"), work=[0.5, 0.5, 0, 0.5]).letters == "AB·B"


def test_the_letter_of_loop_0_is_left_open_where_it_is_not_decided():
    tau = matrix("AAAA")
    tau[0, 1:] = tau[1:, 0] = 0.4
    assert ruled(tau).letters == "?AAA"
    assert ruled(tau).regime == "iterating"


def test_loops_that_differ_are_not_unrolled_while_loop_0_may_do_what_one_of_them_does():
    tau = matrix("DABC")
    assert (ruled(tau).regime, ruled(tau).letters) == ("unrolled", "ABCD")
    tau[0, 3] = tau[3, 0] = 0.45
    assert (ruled(tau).regime, ruled(tau).letters) == ("undecided", "????")
    tau[0, 3] = tau[3, 0] = 0.9
    assert (ruled(tau).regime, ruled(tau).letters) == ("programme", "ABCA")


def test_both_directions_are_asked():
    tau = matrix("AAAA")
    tau[3, 1] = tau[3, 2] = tau[3, 0] = -1.0
    assert ruled(tau).letters != "AAAA"


def test_a_drifting_basis_is_asked_where_the_fixed_one_says_no():
    found = ruled(matrix("ABCD"), aligned=matrix("AAAA"))
    assert (found.regime, found.basis, found.letters) == ("iterating", "drifting", "AAAA")
    assert ruled(matrix("ABCD"), aligned=matrix("ABCD")).regime == "unrolled"
    assert ruled(matrix("ABCD"), aligned=matrix("ABCD", other=0.4)).regime == "unrolled"
    assert ruled(matrix("ABCD"), aligned=matrix("ABCD", other=0.65)).regime == "undecided"
    assert ruled(matrix("ABCD"), aligned=matrix("AAAA", same=0.7)).regime == "undecided", "merely alike"
    found = ruled(matrix("ABAB"), loops=(0, 4), aligned=matrix("ABAB", other=0.65))
    assert (found.regime, found.letters, found.basis) == ("programme", "ABAB", "fixed"), "what τ shows stands"
    found = ruled(matrix("ABAB"), loops=(0, 4), aligned=matrix("AAAA"))
    assert (found.regime, found.basis) == ("iterating", "drifting")
    found = ruled(matrix("AAAA"), aligned=matrix("ABCD"))
    assert (found.regime, found.basis) == ("iterating", "fixed")
    uneven = matrix("AAAA", same=0.95)
    uneven[1, 2] = 0.75
    assert ruled(matrix("ABCD"), aligned=uneven).letters == "AAAA", "the mean of both directions counts"


def test_a_straight_line_is_no_advance():
    assert ruled(matrix("BAAA"), worth=0.0, line=0.4).regime == "settled"
    assert ruled(matrix("BAAA"), worth=0.0, line=2.0).regime == "iterating"


def test_work_that_is_worth_something_advances_without_a_gain_on_the_way():
    found = evidence(matrix("BAAA"), gain=0.0, worth=0.3)
    assert judge([found], thresholds=QUICK)[0].regime == "iterating"


def test_stages_are_rerun_by_the_same_layer_only():
    def layers(same, other):
        loop, layer = (0, 0, 1, 1, 2, 2, 3, 3), (0, 1) * 4
        value = np.where(np.array(layer)[:, None] == np.array(layer)[None], same, other)
        return Layers(Exchanges(noisy(0.5 * (1 - value), spread=0.002), noisy(np.full(8, 0.5), spread=0.002)), loop,
                      layer, (N,))

    assert ruled(matrix("BAAA"), layers=layers(0.9, -0.5)).stages == "re-run"
    assert ruled(matrix("BAAA"), layers=layers(0.9, 0.4)).stages == "undecided"
    assert ruled(matrix("BAAA"), layers=layers(0.1, -0.5)).stages == "not re-run"
    assert ruled(matrix("BAAA")).stages == "not measured"


def test_decisions_are_corrected_for_all_of_a_report():
    """A mean just above the threshold is decided alone, and not beside many more claims."""
    borderline = evidence(matrix("BAAA", same=0.9))
    alone = judge([borderline], thresholds=QUICK)[0]
    many = judge([replace(borderline, role=str(i)) for i in range(40)], thresholds=replace(QUICK, resamples=200))[0]
    assert alone.regime == "iterating"
    assert many.regime == "undecided"
