"""watch: every firing is what the module gave in that loop; edits and gradients are those by hand."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hooks.edits import ablate, freeze, patch, skip_loop
from hooks.foreign.discovery import describe
from hooks.foreign.schedules import Schedule
from hooks.foreign.watching import watch
from hooks.reducers import Mean
from hooks.sites import SiteError
from tests.small_looped import SCHEDULE, Looped, by_hand, looped, n_hooks, states


@pytest.fixture
def model():
    return looped()


@pytest.fixture
def x():
    return states()


# -------------------------------------------------------------------- recording


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule(SCHEDULE), None], ids=["mapping", "declared", "discovered"])
def test_every_firing_is_what_the_module_gave_in_that_loop(model, x, schedule):
    expected = by_hand(model, x)
    with watch(model, ["core.**", "prelude.hook_out", "coda.hook_out"], schedule=schedule) as rec:
        out = model(x)
    assert set(rec) == set(expected)
    for site, value in expected.items():
        assert torch.equal(rec[site], value), site
    assert torch.equal(out, expected["coda.hook_out"])
    assert torch.equal(rec["core.1.hook_out@-1"], expected["core.1.hook_out@3"])
    assert rec.stack("core.0.hook_in").shape == (4, 3, 5, 8)
    assert rec.to_xarray("core.0.hook_out").dims == ("loop", "batch", "pos", "d_model")
    assert not n_hooks(model)


def test_counting_starts_anew_at_every_forward(model, x):
    with watch(model, "core.0.hook_out", schedule=SCHEDULE) as rec:
        for scale in (1, 2):
            model(scale * x)
            assert torch.equal(rec["core.0.hook_out@2"], by_hand(model, scale * x)["core.0.hook_out@2"])
        model.core[0](x)  # a module used by itself is not a firing
        model(x)
    assert torch.equal(rec["core.0.hook_out@2"], by_hand(model, x)["core.0.hook_out@2"])


def test_each_forward_can_be_handed_on(model, x):
    seen = []
    with watch(model, "core.0.hook_out@-1", schedule=SCHEDULE, on_forward=seen.append):
        model(x)
        model(2 * x)
    assert [torch.equal(rec["core.0.hook_out@3"], by_hand(model, scale * x)["core.0.hook_out@3"])
            for rec, scale in zip(seen, (1, 2), strict=True)] == [True, True]


def test_the_copy_is_cut_reduced_and_cast(model, x):
    with watch(model, "core.0.hook_out", schedule=SCHEDULE, pos_slice=slice(1, 3), batch_slice=slice(0, 2),
               dtype=torch.float64) as rec:
        model(x)
    expected = by_hand(model, x)["core.0.hook_out@2"]
    assert torch.equal(rec["core.0.hook_out@2"], expected[:2, 1:3].double())
    with watch(model, "core.0.hook_out", schedule=SCHEDULE, reduce=Mean("pos")) as rec:
        model(x)
    torch.testing.assert_close(rec["core.0.hook_out@2"], expected.mean(1))
    assert rec.to_xarray("core.0.hook_out").dims == ("loop", "batch", "d_model")


def test_a_schedule_that_was_discovered_can_be_used_again(model, x, capsys):
    found = describe(model, x)
    printed = capsys.readouterr().out
    assert printed == f"{found}\n"
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["module", "class", "calls", "in", "out"]
    assert ["core.1", "Linear", "4", "[3,", "5,", "8]", "[3,", "5,", "8]"] in lines
    assert "idle" not in printed
    with (pytest.raises(SiteError, match=r"No site is called 'idle\.hook_out'"),
          watch(model, "idle.hook_out", schedule=found.schedule)):
        pass
    with watch(model, "core.*.hook_out@1", schedule=found.schedule) as rec:
        model(x)
    assert torch.equal(rec["core.1.hook_out@1"], by_hand(model, x)["core.1.hook_out@1"])


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout()

    def forward(self, x, cache):
        cache.append(len(cache))
        return self.drop(self.norm(x))


def test_a_dry_run_leaves_no_trace(x):
    model, twin = Stateful(), Stateful()
    data, cache = torch.randn(6, 4), []
    torch.manual_seed(3)
    expected = twin(data, [])
    torch.manual_seed(3)
    with watch(model, "norm.hook_out") as rec:
        out = model(data, cache=cache)
    assert torch.equal(out, expected)
    assert cache == [0]
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    assert int(model.norm.num_batches_tracked) == 1
    assert list(rec) == ["norm.hook_out"]


def test_input_and_output_of_the_whole(model, x):
    for schedule in (SCHEDULE, None):
        with watch(model, ["hook_in", "hook_out"], schedule=schedule,
                   fwd_hooks=[("hook_in", lambda x, hook: 2 * x)]) as rec:
            out = model(x)
            again = model(x)
        assert torch.equal(out, by_hand(model, 2 * x)["coda.hook_out"])
        assert torch.equal(out, again)
        assert torch.equal(rec["hook_in"], 2 * x)
        assert torch.equal(rec["hook_out"], out)


def test_a_seed_makes_forwards_alike_and_leaves_the_random_state(x):
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout())
    state = torch.get_rng_state()
    with watch(model, "1.hook_out", seed=1) as rec:
        model(x)
        first = rec["1.hook_out"]
        model(x)
    assert torch.equal(first, rec["1.hook_out"])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_names_are_functions_whatever_was_imported_first():
    import hooks

    assert (hooks.watch, hooks.describe) == (watch, describe)
    assert callable(hooks.loopify)


# ------------------------------------------------------------------------ edits


def test_an_edit_in_one_loop_is_that_edit_by_hand(model, x):
    noise = torch.randn(8)
    state = model.prelude(x)
    for k in range(4):
        for i, layer in enumerate(model.core):
            state = layer(state)
            if (k, i) == (2, 0):
                state = state + noise
            state = torch.tanh(state)
    seen = []

    def add(value, hook):
        seen.append((hook.site, hook.name, hook.loop))
        return value + noise

    with watch(model, "core.*.hook_out", schedule=SCHEDULE, fwd_hooks=[("core.0.hook_out@2", add)]) as rec:
        out = model(x)
    assert torch.equal(out, model.coda(state))
    assert seen == [("core.0.hook_out@2", "core.0.hook_out", 2)]
    before = by_hand(model, x)
    assert torch.equal(rec["core.0.hook_out@2"], before["core.0.hook_out@2"] + noise)  # recorded as it goes on
    assert torch.equal(rec["core.1.hook_out@1"], before["core.1.hook_out@1"])


def test_edits_of_the_library_work_at_sites(model, x):
    clean, other = by_hand(model, x), by_hand(model, -x)
    with watch(model, "core.0.hook_out", schedule=SCHEDULE) as rec:
        model(x)
    with watch(model, "coda.hook_out", schedule=SCHEDULE, fwd_hooks=[patch("core.0.hook_out@0", rec)]) as patched:
        model(-x)
    assert torch.equal(patched["coda.hook_out"], clean["coda.hook_out"])  # all that follows depends on it alone
    assert not torch.equal(patched["coda.hook_out"], other["coda.hook_out"])
    with watch(model, "core.1.hook_in", schedule=SCHEDULE, fwd_hooks=[ablate("core.0.hook_out@1")]) as rec:
        model(x)
    assert not rec["core.1.hook_in@1"].any()
    with (pytest.raises(ValueError, match="needs a model that can re-plan its run"),
          watch(model, fwd_hooks=[skip_loop(1)])):
        pass


def test_patching_with_itself_changes_nothing(model, x):
    with watch(model, None) as rec:
        out = model(x)
    with watch(model, (), fwd_hooks=[patch(site, rec) for site in rec]):
        assert torch.equal(model(x), out)


# -------------------------------------------------------------------- gradients


def test_gradients_per_loop_equal_autograd(model, x):
    seen = by_hand(model, x)
    sites = [f"core.{i}.hook_out@{k}" for k in range(4) for i in range(2)]
    expected = torch.autograd.grad(seen["coda.hook_out"].square().sum(), [seen[site] for site in sites])
    caught = {}
    with watch(model, "core.*.hook_out", schedule=SCHEDULE, gradients=True,
               bwd_hooks=[("core.0.hook_out@1", lambda g, hook: caught.update({hook.site: g}))]) as rec:
        model(x).square().sum().backward()
    assert set(rec.gradients) == set(sites)
    for site, gradient in zip(sites, expected, strict=True):
        torch.testing.assert_close(rec.gradients[site], gradient)
    torch.testing.assert_close(rec.gradients.stack("core.0.hook_out")[1], caught["core.0.hook_out@1"])


def test_a_backward_hook_may_replace_the_gradient(model, x):
    with watch(model, (), schedule=SCHEDULE, bwd_hooks=[("core.0.hook_out@0", lambda g, hook: torch.zeros_like(g))]):
        model(x).sum().backward()
    assert not model.prelude.weight.grad.any()
    assert model.coda.weight.grad.any()


def test_without_gradients_the_message_says_why(model, x):
    with (torch.no_grad(), pytest.raises(RuntimeError, match=r"no gradient reaches core\.0\.hook_out@0: run the"),
          watch(model, "core.0.hook_out", schedule=SCHEDULE, gradients=True)):
        model(x)
    assert not n_hooks(model)


class Nested(nn.Module):
    """(L L L H) × 2 on a state, in the manner of HRM."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.L, self.H = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        for _ in range(2):
            for _ in range(3):
                x = torch.tanh(self.L(x))
            x = self.H(x)
        return x


NESTED = {"L": {"h": 2, "l": 3}, "H": {"h": 2}}


@pytest.mark.parametrize("start", [(0, 1), (1, 0), (0, 0), (-1, -2), (1, 2)])
def test_freezing_in_nested_cycles_follows_the_order_of_firing(x, start):
    model = Nested()
    with watch(model, "*.hook_out", schedule=NESTED) as plain:
        model(x)
    with watch(model, "*.hook_out", schedule=NESTED, fwd_hooks=[freeze(start, "L.hook_out")]) as rec:
        model(x)
    h, layer = (i % n for i, n in zip(start, (2, 3), strict=True))
    for site in (f"L.hook_out@h{i}.l{j}" for i in range(2) for j in range(3)):
        later = site > f"L.hook_out@h{h}.l{layer}"
        assert torch.equal(rec[site], plain[f"L.hook_out@h{h}.l{layer}" if later else site]), site
    assert torch.equal(rec["H.hook_out@h0"], rec["H.hook_out@h1"]) == (h == 0)


def test_freezing_needs_an_index_for_each_cycle(x):
    model = Nested()
    few = r"L\.hook_out is looped over 2 cycles, and from_loop=\(1,\) names 1: give one .*\(h, l\)\."
    for start, message in (((1,), few), (1, "looped over 2 cycles"), ((2, 0), "cannot fire"), ((0, -4), "cannot fire")):
        with pytest.raises(SiteError, match=message), watch(model, (), schedule=NESTED,
                                                             fwd_hooks=[freeze(start, "L.hook_out")]):
            model(x)


@pytest.mark.parametrize(("make", "kind"), [(lambda v: v[:1], ValueError), (lambda v: v.mean(), ValueError),
                                            (lambda v: v.double(), ValueError), (lambda v: 0.0, TypeError)])
def test_hooks_that_return_what_cannot_stand_there_are_refused(model, x, make, kind):
    with (pytest.raises(kind, match=r"the hook at core\.0\.hook_out@1 returned"),
          watch(model, (), schedule=SCHEDULE, fwd_hooks=[("core.0.hook_out@1", lambda v, hook: make(v))])):
        model(x)
    with (pytest.raises(kind, match=r"the hook at core\.0\.hook_out@1 \(gradient\) returned"),
          watch(model, (), schedule=SCHEDULE, bwd_hooks=[("core.0.hook_out@1", lambda v, hook: make(v))])):
        model(x).sum().backward()


def test_regular_expressions_choose_sites(model, x):
    with watch(model, re.compile(r"^core\.\d\.hook_out$"), schedule=SCHEDULE) as rec:
        model(x)
    with watch(model, [re.compile("^prelude.*out"), "core.0.hook_in@1"], schedule=SCHEDULE) as both:
        model(x)
    assert list(rec) == [f"core.{i}.hook_out@{k}" for k in range(4) for i in range(2)]
    assert set(both) == {"prelude.hook_out", "core.0.hook_in@1"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_are_recorded_once_and_edits_in_them_refused(model, x, reentrant):
    class Saving(Looped):
        def forward(self, x):
            x = self.prelude(x)
            for _ in range(4):
                x = checkpoint(lambda x: torch.tanh(self.core[0](x)), x, use_reentrant=reentrant)
            return self.coda(x)

    model = Saving()
    with watch(model, "core.0.hook_out", schedule=SCHEDULE) as rec:
        model(x).sum().backward()
    assert len(rec) == 4
    with (pytest.raises(RuntimeError, match=r"core\.0\.hook_out is run again by the backward pass"),
          watch(model, (), schedule=SCHEDULE, fwd_hooks=[("core.0.hook_out@1", lambda v, hook: v * 2)])):
        model(x).sum().backward()


def test_no_grad_and_autocast(model, x):
    with torch.no_grad(), watch(model, "core.0.hook_out", schedule=SCHEDULE) as rec:
        model(x)
    assert torch.equal(rec["core.0.hook_out@3"], by_hand(model, x)["core.0.hook_out@3"])
    with torch.autocast("cpu", dtype=torch.bfloat16), watch(model, "core.0.hook_out", schedule=SCHEDULE) as rec:
        model(x)
    assert rec["core.0.hook_out@3"].dtype == torch.bfloat16
