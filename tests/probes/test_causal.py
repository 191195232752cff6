"""Causal effects against runs with edits, naive loops over the definition, and planted places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hooks import Unavailable, adopt
from hooks.edits import patch, skip_layer, steer
from probes.causal import (
    EFFECTS,
    attribution_error,
    attribution_patch_resid_pre,
    causal_scan,
    dose_curve,
    get_act_patch_loops,
    get_act_patch_resid_pre,
    logit_of,
    nll_of,
)
from probes.intervals import over_examples
from tests.small import MASK, small_model, small_tokens
from tests.specimens import SPECIMENS

LOOPS = 3


@pytest.fixture(scope="module")
def asked():
    model, tokens = small_model(seed=8, loop_embedding="learned"), small_tokens(6)
    truth = torch.randint(0, 6, tokens.shape, generator=torch.Generator().manual_seed(2))
    return model, tokens, truth


@pytest.fixture(scope="module")
def scan(asked):
    model, tokens, truth = asked
    return causal_scan(model, tokens, targets=truth, n_loops=LOOPS)


def by_hand(logits, clean, truth, scored):
    """(nll, KL from clean, accuracy, exact) [example] in a loop over examples."""
    out = []
    for answer, was, true, where in zip(logits, clean, truth, scored, strict=True):
        log_p, log_q = answer[where].log_softmax(-1), was[where].log_softmax(-1)
        possible = torch.isfinite(log_q)
        kl = torch.where(possible, log_q.exp() * (log_q - log_p), 0.0).sum(-1).mean()
        right = answer[where].argmax(-1) == true[where]
        out.append((torch.nn.functional.nll_loss(log_p, true[where]), kl, right.float().mean(), right.all().float()))
    return np.array(out).T


def agrees(scan, effect, depth, logits, asked):
    model, tokens, truth = asked
    clean, scored = model(tokens, LOOPS), model.scored(tokens)
    nll, kl, accuracy, exact = by_hand(logits, clean, truth, scored)
    nll0, _, accuracy0, exact0 = by_hand(clean, clean, truth, scored)
    at = scan.sel(effect=effect, depth=depth)
    for name, expected in (("nll", nll - nll0), ("kl", kl), ("accuracy", accuracy0 - accuracy),
                           ("exact", exact0 - exact)):
        np.testing.assert_allclose(at[name], expected, atol=2e-5, err_msg=f"{effect} {depth} {name}")
    np.testing.assert_allclose(scan.clean_nll, nll0, atol=1e-5)


@torch.no_grad()
def test_every_effect_equals_its_definition_carried_out_by_hand(asked, scan):
    model, tokens, _ = asked
    states, _, context = model.run(tokens, LOOPS)
    topology = context.topology
    for depth, (layer, loop) in enumerate(topology.unrolled()):
        before, after = states[depth], states[depth + 1]
        agrees(scan, "skip", depth, model.resume(depth + 1, before, context), asked)
        agrees(scan, "mean", depth, model.resume(depth + 1, before + (after - before).mean(0), context), asked)
        agrees(scan, "repeat", depth, model.resume(depth + 1, model.apply(depth, after, context), context), asked)
        if loop:
            last = topology.unrolled().index((layer, loop - 1))
            made = before + states[last + 1] - states[last]
            agrees(scan, "freeze", depth, model.resume(depth + 1, made, context), asked)
        else:
            assert scan.nll.sel(effect="freeze", depth=depth).isnull().all()


@torch.no_grad()
def test_leaving_a_layer_out_is_the_edit_of_that_name(asked, scan):
    model, tokens, _ = asked
    for loop in range(LOOPS):
        depth = model.topology(LOOPS).loop_depths()[loop][1]
        agrees(scan, "skip", depth, model.run_with_hooks(tokens, LOOPS, fwd_hooks=[skip_layer(2, loop)]), asked)


@torch.no_grad()
def test_resampling_takes_the_update_of_another_example(asked, scan):
    model, tokens, truth = asked
    states, clean, context = model.run(tokens, LOOPS)
    scored = model.scored(tokens)
    depth = 2
    update = states[depth + 1] - states[depth]
    base = by_hand(clean, clean, truth, scored)[0]
    candidates = np.array([by_hand(model.resume(depth + 1, states[depth] + update[[e] * 6], context), clean, truth,
                                   scored)[0] - base for e in range(6)])               # [source, example]
    found = scan.nll.sel(effect="resample", depth=depth).values
    sources = [np.flatnonzero(np.isclose(candidates[:, e], found[e], atol=2e-5)) for e in range(6)]
    assert all(len(source) >= 1 and e not in source for e, source in enumerate(sources))
    again = causal_scan(model, tokens, targets=truth, n_loops=LOOPS, effects=("resample",))
    np.testing.assert_allclose(again.nll.sel(effect="resample"), scan.nll.sel(effect="resample"), atol=1e-5)


def test_chunks_change_nothing(asked, scan):
    model, tokens, truth = asked
    chunked = causal_scan(model, tokens, targets=truth, n_loops=LOOPS, rows=4)
    np.testing.assert_allclose(chunked.nll, scan.nll, atol=1e-5)


@torch.no_grad()
def test_only_the_chosen_positions_are_changed(asked):
    model, tokens, truth = asked
    at = torch.zeros_like(tokens, dtype=torch.bool)
    at[:, 4] = True
    found = causal_scan(model, tokens, targets=truth, n_loops=LOOPS, effects=("skip",), at=at)
    depth = model.topology(LOOPS).loop_depths()[1][1]
    agrees(found, "skip", depth, model.run_with_hooks(tokens, LOOPS, fwd_hooks=[skip_layer(2, 1, at=[4])]), asked)
    nowhere = causal_scan(model, tokens, targets=truth, n_loops=LOOPS, effects=("skip", "mean"), at=at & ~at)
    np.testing.assert_allclose(nowhere.kl, 0, atol=1e-6)


# ------------------------------------------------------------------------------ planted

class Planted(nn.Module):
    """Layer a counts; layer b writes the answer, the sign of what entered, when the count is 2: in loop 1."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Clock(), Writer()

    def forward(self, x):
        for _ in range(LOOPS):
            x = self.b(self.a(x))
        return planted_readout(x)


class Clock(nn.Module):
    def forward(self, x):
        return x + torch.tensor([0.0, 0.0, 1.0])


class Writer(nn.Module):
    def forward(self, x):
        out = x.clone()
        out[..., 1] = torch.where(x[..., 2].round() == 2, 4 * x[..., 0].sign(), x[..., 1])
        return out


def planted_readout(x):
    return torch.stack([-x[..., 1], x[..., 1]], -1)


def test_the_planted_layer_of_the_planted_loop_is_found():
    model = adopt(Planted(), layers=["a", "b"], n_loops=LOOPS, readout=planted_readout)
    x = torch.zeros(16, 1, 3)
    x[::2, :, 0], x[1::2, :, 0] = 1.0, -1.0
    truth = (x[..., 0] > 0).long()
    found = causal_scan(model, x, targets=truth, scored=torch.ones_like(truth, dtype=torch.bool), effects=("skip",))
    exact = found.exact.sel(effect="skip").mean("example")
    where = int(exact.argmax("depth"))
    assert (int(found.layer[where]), int(found.loop[where])) == (1, 1)
    assert float(exact[where]) == pytest.approx(0.5), "half of the guesses are right without it"
    swapped = x.roll(1, 0)                    # every example has its neighbour's bit
    metric = logit_of(truth, torch.ones_like(truth, dtype=torch.bool))
    patched = get_act_patch_resid_pre(model, swapped, x, metric)
    share = ((patched - patched.corrupted) / (patched.clean - patched.corrupted)).mean("example").isel(pos=0)
    np.testing.assert_allclose(share, [1, 1, 1, 1, 1, 1])   # once written, the answer is patched along
    loops = get_act_patch_loops(model, swapped, x, metric)
    assert loops.sizes == {"loop": 3, "clean_loop": 3, "example": 16}
    np.testing.assert_allclose(loops.isel(loop=2, clean_loop=[1, 2]).T - loops.clean, 0, atol=1e-6)
    assert (loops.isel(loop=2, clean_loop=0) < loops.clean).all(), "nothing is written yet after loop 0"


# ------------------------------------------------------------------------------ patching

@torch.no_grad()
def test_patched_states_equal_a_run_with_each_edit(asked):
    model, clean, truth = asked
    corrupted = clean.roll(1, 0)
    metric = nll_of(truth, model.scored(clean))
    found = get_act_patch_resid_pre(model, corrupted, clean, metric, n_loops=LOOPS, rows=17)
    _, rec = model.run_with_cache(clean, LOOPS, names_filter="blocks.*.hook_resid_pre")
    for depth in (0, 2, 5, 7):
        for pos in (0, 8):
            site = model.site(depth, "resid_pre", n_loops=LOOPS)
            logits = model.run_with_hooks(corrupted, LOOPS, fwd_hooks=[patch(site, rec[site], at=[pos])])
            np.testing.assert_allclose(found.sel(depth=depth, pos=pos), metric(logits, torch.arange(6)), atol=1e-5)
    np.testing.assert_allclose(found.clean, metric(model(clean, LOOPS), torch.arange(6)), atol=1e-5)
    np.testing.assert_allclose(found.corrupted, metric(model(corrupted, LOOPS), torch.arange(6)), atol=1e-5)


@torch.no_grad()
def test_patched_loops_equal_a_run_with_each_edit(asked):
    model, clean, truth = asked
    corrupted = clean.roll(1, 0)
    metric = nll_of(truth, model.scored(clean))
    found = get_act_patch_loops(model, corrupted, clean, metric, n_loops=LOOPS)
    _, rec = model.run_with_cache(clean, LOOPS, names_filter="blocks.2.hook_resid_post")
    for i in range(LOOPS):
        for j in range(LOOPS):
            edit = patch(f"blocks.2.hook_resid_post@{i}", rec[f"blocks.2.hook_resid_post@{j}"])
            logits = model.run_with_hooks(corrupted, LOOPS, fwd_hooks=[edit])
            np.testing.assert_allclose(found.sel(loop=i, clean_loop=j), metric(logits, torch.arange(6)), atol=1e-5)


def test_attribution_is_exact_in_the_limit_and_says_how_wrong_it_is_otherwise():
    """Inputs that are states of a linear map: the metric is linear in them, so that the first order is all there is."""
    torch.manual_seed(0)
    model = adopt(Linear(), layers=["b"], n_loops=3, readout=lambda x: x[..., :4])
    clean, corrupted = torch.randn(5, 3, 8), torch.randn(5, 3, 8)
    metric = logit_of(torch.ones(5, 3, dtype=torch.long), torch.ones(5, 3, dtype=torch.bool))
    exact = get_act_patch_resid_pre(model, corrupted, clean, metric)
    np.testing.assert_allclose(attribution_patch_resid_pre(model, corrupted, clean, metric), exact, atol=1e-5)
    bent, tokens = small_model(seed=8), small_tokens(6)
    metric = nll_of(tokens.clamp_max(5), bent.scored(tokens))
    other = tokens.roll(1, 0)
    exact = get_act_patch_resid_pre(bent, other, tokens, metric, n_loops=LOOPS)
    first = attribution_patch_resid_pre(bent, other, tokens, metric, n_loops=LOOPS)
    error = attribution_error(first, exact)
    assert error.dims == ("depth",)
    assert float(error.min()) > 0.02
    depth = int(error.argmax("depth"))
    effect = (exact - exact.corrupted).sel(depth=depth).values
    wrong = (first - exact).sel(depth=depth).values
    assert float(error.max()) == pytest.approx(((wrong ** 2).mean() / (effect ** 2).mean()) ** 0.5, rel=1e-4)


def test_layers_that_run_without_gradients_have_no_attribution():
    specimen = SPECIMENS["hrm-text"]()
    metric = nll_of(specimen.model.targets(specimen.inputs), specimen.model.scored(specimen.inputs))
    with pytest.raises(Unavailable, match=r"without gradients, under torch\.no_grad\(\)"):
        attribution_patch_resid_pre(specimen.model, specimen.inputs.roll(1, 0), specimen.inputs, metric,
                                    n_loops=specimen.n_loops)


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.b = nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(3):
            x = self.b(x)
        return x[..., :4]


@torch.no_grad()
def test_a_dose_is_the_edit_steer(asked):
    model, tokens, truth = asked
    metric, direction = nll_of(truth, model.scored(tokens)), torch.linspace(-1, 1, 16)
    at = torch.zeros_like(tokens, dtype=torch.bool)
    at[:, 2] = True
    found = dose_curve(model, tokens, direction, 3, [-1.0, 0.0, 2.0], metric, n_loops=LOOPS, at=at)
    site = model.site(3, "resid_pre", n_loops=LOOPS)
    for dose in (-1.0, 0.0, 2.0):
        logits = model.run_with_hooks(tokens, LOOPS, fwd_hooks=[steer(site, direction, dose, at=[2])])
        np.testing.assert_allclose(found.sel(dose=dose), metric(logits, torch.arange(6)), atol=1e-5)


# -------------------------------------------------------------------------- any model, bad input

@pytest.mark.parametrize("name", SPECIMENS)
def test_the_scan_runs_on_any_looped_model(name):
    specimen = SPECIMENS[name]()
    model, inputs = specimen.model, specimen.inputs
    options = {} if specimen.targets is None else {"targets": specimen.targets}
    if name == "without-positions":
        options["scored"] = torch.ones(6, 1, dtype=torch.bool)
    if name == "positions-first":
        options["scored"] = torch.ones_like(specimen.targets, dtype=torch.bool)
    found = causal_scan(model, inputs, n_loops=specimen.n_loops, **options)
    assert found.sizes["depth"] == model.topology(specimen.n_loops).depth
    assert np.isfinite(found.kl.sel(effect=["skip", "mean", "resample", "repeat"])).all()
    assert (found.kl.sel(effect="skip") > -1e-6).all()


def test_intervals_are_over_examples(scan):
    told = over_examples(scan.nll, n_resamples=400)
    assert told.value.dims == ("effect", "depth")
    np.testing.assert_allclose(told.value, scan.nll.mean("example"), atol=1e-6)
    assert (told.low <= told.value).where(told.value.notnull(), True).all()
    assert (told.high >= told.value).where(told.value.notnull(), True).all()
    constant = over_examples(scan.nll * 0 + 1, n_resamples=50)
    np.testing.assert_allclose(constant.high - constant.low, np.where(constant.value.isnull(), np.nan, 0))
    with pytest.raises(ValueError, match="no examples"):
        over_examples(scan.nll.mean("example"))


@pytest.mark.unchecked
def test_bad_input_is_refused_before_anything_is_changed(asked):
    model, tokens, truth = asked
    for options, message in (({"effects": ("erase",)}, "no effects are called erase"),
                             ({"targets": truth[:, :3]}, "targets have shape"),
                             ({"scored": torch.zeros_like(tokens, dtype=torch.bool)}, "no position is scored"),
                             ({"scored": torch.ones(2, 2, dtype=torch.bool)}, "scored has shape"),
                             ({"at": torch.ones(2, 2, dtype=torch.bool)}, "at has shape"),
                             ({"targets": None}, "give clean tokens")):
        with pytest.raises(ValueError, match=message):
            causal_scan(model, tokens, **({"targets": truth} | options))
    with pytest.raises(ValueError, match="there is one"):
        causal_scan(model, tokens[:1], targets=truth[:1])
    metric = nll_of(truth, tokens == MASK)
    with pytest.raises(ValueError, match="same examples and positions"):
        get_act_patch_resid_pre(model, tokens, tokens[:, :5], metric)
    with pytest.raises(ValueError, match="a number per example"):
        get_act_patch_loops(model, tokens, tokens, lambda logits, rows: logits.mean())
    with pytest.raises(ValueError, match="depth 99"):
        dose_curve(model, tokens, torch.zeros(16), 99, [0.0], metric)
    with pytest.raises(ValueError, match="d_model"):
        dose_curve(model, tokens, torch.zeros(5), 1, [0.0], metric)
    broken = small_model()
    with torch.no_grad():
        broken.blocks[1].mlp.down.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        causal_scan(broken, tokens, targets=truth)
    assert set(EFFECTS) == {"skip", "mean", "resample", "repeat", "freeze"}
