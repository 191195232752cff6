"""watch: every firing numbered rightly, in any nesting; edits, gradients; every refusal, with what to do."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from hooks.discovery import describe, discover, walk
from hooks.edits import ablate, patch, skip_loop
from hooks.reducers import Mean
from hooks.schedules import Schedule
from hooks.sites import SiteError
from hooks.watch import watch

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


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Looped()


@pytest.fixture
def x():
    return torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))


def n_hooks(model):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


# -------------------------------------------------------------------- recording


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule(SCHEDULE), None], ids=["mapping", "declared", "discovered"])
def test_every_firing_is_what_the_module_gave_in_that_loop(model, x, schedule):
    expected = by_hand(model, x)
    with watch(model, ["core.*", "prelude.hook_out", "coda.hook_out"], schedule=schedule) as rec:
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


# ------------------------------------------------- any nesting (property-based)


class Leaf(nn.Module):
    """Adds to its log the number of its call among all calls, and returns it."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def forward(self, x):
        self.log.append((self, None))
        return torch.full((1,), float(len(self.log)))


class Program(nn.Module):
    """Runs a tree of ('leaf', name) and ('loop', letter, count, children)."""

    def __init__(self, tree):
        super().__init__()
        self.tree, self.log, self.expected, self.axes = tree, [], {}, {}
        self.leaves = nn.ModuleDict()
        self._declare(tree, ())

    def _declare(self, nodes, axes):
        for node in nodes:
            if node[0] == "leaf":
                self.leaves[node[1]] = Leaf(self.log)
                self.axes[node[1]] = axes
            else:
                self._declare(node[3], (*axes, (node[1], node[2])))

    def forward(self, x):
        self.log.clear()
        self.expected = {}
        self._run(self.tree, ())
        return x

    def _run(self, nodes, at):
        for node in nodes:
            if node[0] == "leaf":
                axes = self.axes[node[1]]
                parts = [str(i) if len(at) == 1 else f"{letter}{i}" for (letter, _), i in zip(axes, at, strict=True)]
                site = f"leaves.{node[1]}.hook_out" + ("@" + ".".join(parts) if parts else "")
                self.expected[site] = float(self.leaves[node[1]](torch.zeros(1)))
            else:
                for i in range(node[2]):
                    self._run(node[3], (*at, i))


@st.composite
def programs(draw):
    """A random tree of nested loops, each leaf in it once, each loop with a letter of its own."""
    letters, names = iter("abcdefghijklmnop"), iter(f"m{i}" for i in range(99))

    def nodes(depth):
        made = []
        for _ in range(draw(st.integers(1, 3 if depth else 4))):
            if depth < 3 and draw(st.booleans()):
                letter = next(letters, None)
                if letter:
                    made.append(("loop", letter, draw(st.integers(1, 3)), nodes(depth + 1)))
                    continue
            made.append(("leaf", next(names)))
        return made

    return nodes(0)


@given(programs())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_firing_is_misnumbered_in_any_nesting(tree):
    model = Program(tree)
    schedule = {name: axes[0][1] if len(axes) == 1 else dict(axes) for name, axes in model.axes.items() if axes}
    with watch(model, "leaves.*.hook_out", schedule=schedule) as rec:
        model(torch.zeros(1))
        model(torch.zeros(1))
    assert {site: float(value) for site, value in rec.items()} == model.expected
    with watch(model, "leaves.*.hook_out") as rec:  # discovered: numbered in order, without nesting
        model(torch.zeros(1))
    flat: dict[str, list[float]] = {}
    for site, value in model.expected.items():
        flat.setdefault(site.partition("@")[0], []).append(value)
    assert {name: [float(rec[name])] if name in rec else rec.stack(name).flatten().tolist() for name in flat} == flat


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


class Pair(NamedTuple):
    note: str
    state: torch.Tensor


@dataclass
class Result:
    loss: torch.Tensor
    logits: torch.Tensor


class Returns(nn.Module):
    def __init__(self, wrap, unwrap):
        super().__init__()
        self.inner = _Wrapped(wrap)
        self.unwrap = unwrap

    def forward(self, x):
        self.returned = self.inner(hidden_states=x)
        return self.unwrap(self.returned)


class _Wrapped(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, hidden_states):
        return self.wrap(hidden_states * 2)


def model_output(h):
    from transformers.modeling_outputs import MaskedLMOutput

    return MaskedLMOutput(loss=h.sum(), logits=h)


@pytest.mark.parametrize(("wrap", "unwrap"), [
    (lambda h: (h, None), lambda o: o[0]),
    (lambda h: (torch.arange(3), h), lambda o: o[1]),
    (lambda h: [None, {"x": h}], lambda o: o[1]["x"]),
    (lambda h: {"loss": h.sum(), "logits": h}, lambda o: o["logits"]),
    (lambda h: Pair("n", h), lambda o: o.state),
    (lambda h: Result(h.sum(), h), lambda o: o.logits),
    (model_output, lambda o: o.logits),
    (lambda h: ({"last_hidden_state": h}, []), lambda o: o[0]["last_hidden_state"]),
], ids=["tuple", "ids-first", "nested", "dict", "namedtuple", "dataclass", "modeloutput", "ouro"])
def test_the_hidden_state_in_a_container_is_recorded_and_edited(wrap, unwrap, x):
    model = Returns(wrap, unwrap)
    with watch(model, ["inner.hook_out", "inner.hook_in"]) as rec:
        model(x)
    assert torch.equal(rec["inner.hook_out"], 2 * x)
    assert torch.equal(rec["inner.hook_in"], x)
    plain = model.returned
    with watch(model, (), fwd_hooks=[("inner.hook_out", lambda h, hook: h + 1),
                                     ("inner.hook_in", lambda h, hook: h * 10)]):
        assert torch.equal(model(x), 20 * x + 1)
    assert type(model.returned) is type(plain)
    assert torch.equal(model(x), 2 * x)


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


# --------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("sites", "message"), [
    ("cores.0.hook_out", r"No site is called 'cores\.0\.hook_out'. Nearest: 'core\.0\.hook_out'"),
    ("core.0.hook_out@4", r"cannot fire: core\.0\.hook_out runs 4 loops here, numbered 0\.\.3"),
    ("prelude.hook_out@0", r"'prelude\.hook_out' runs once per forward and takes no '@0'"),
])
def test_sites_that_cannot_fire_are_refused_before_the_run(model, x, sites, message):
    ran = []
    with pytest.raises(SiteError, match=message), watch(model, sites, schedule=SCHEDULE):
        pytest.fail("the block was entered")
    model.coda.register_forward_hook(lambda *given: ran.append(1))
    with pytest.raises(SiteError, match=message), watch(model, sites):  # discovered: before the first forward
        model(x)
    assert ran == [1]  # in the dry run
    model.coda._forward_hooks.clear()
    assert not n_hooks(model)


def test_another_number_of_firings_is_an_error_that_says_expected_and_seen(model, x):
    too_few = (r"core\.0 should run 4 times per forward by the schedule, and ran 3 times: its loops cannot be told "
               r"apart\. Give watch the schedule of this forward")
    with pytest.raises(RuntimeError, match=too_few), watch(model, "core.0.hook_out", schedule=SCHEDULE):
        model(x, n_loops=3)
    with (pytest.raises(RuntimeError, match=r"core\.0 should run 4 times .*, and has now run 5 times"),
          watch(model, "core.0.hook_out@1", schedule=SCHEDULE)):
        model(x, n_loops=5)
    with watch(model, "core.0.hook_out"):
        model(x)
        with pytest.raises(RuntimeError, match=too_few):
            model(x, n_loops=3)
    assert not n_hooks(model)


def test_a_site_that_never_fires_is_an_error_unless_only_a_wildcard_named_it(model, x):
    with (pytest.raises(RuntimeError, match=r"idle should run once per forward by the schedule, and ran 0 times"),
          watch(model, "idle.hook_out", schedule=SCHEDULE)):
        model(x)
    with (pytest.raises(RuntimeError, match=r"'idle\.\*': none of the 2 sites that this names fired in the forward"),
          watch(model, ["idle.*", "core.*"], schedule=SCHEDULE)):
        model(x)
    with watch(model, None, schedule=SCHEDULE) as rec:
        model(x)
    assert not any("idle" in site for site in rec)
    with pytest.raises(SiteError, match=r"No site is called 'idle\.hook_out'"):
        rec["idle.hook_out"]


class Talkative(nn.Module):
    def __init__(self):
        super().__init__()
        self.says = _Wrapped(lambda h: ("no", None))

    def forward(self, x):
        self.says(x)
        return x


def test_an_output_without_a_tensor_is_refused(x):
    message = (r"says\.hook_out: _Wrapped returned a tuple of str, NoneType, in which there is no tensor to record or "
               r"edit: watch a module inside it or around it\.")
    with (pytest.raises(TypeError, match=message),
          watch(model := Talkative(), "says.hook_out")):
        model(x)


def test_a_hook_must_return_a_tensor_or_nothing(model, x):
    with (pytest.raises(TypeError, match=r"hook at core\.0\.hook_out@0 returned a tuple of Tensor: return a tensor"),
          watch(model, (), schedule=SCHEDULE, fwd_hooks=[("core.0.hook_out", lambda v, hook: (v,))])):
        model(x)


def test_nothing_recorded_is_said_clearly(model, x):
    with watch(model, "core.0.hook_out", schedule=SCHEDULE) as rec:
        with pytest.raises(SiteError, match="nothing is recorded: no forward of the watched module has finished"):
            rec["core.0.hook_out@0"]
        model(x)
        assert len(rec) == 4
        with pytest.raises(RuntimeError):
            model(x[..., :3])
        assert len(rec) == 0  # a failed forward leaves nothing, and the next one counts from 0
        model(x)
    assert torch.equal(rec["core.0.hook_out@2"], by_hand(model, x)["core.0.hook_out@2"])


def test_a_block_without_a_forward_is_an_error(model, x):
    with (pytest.raises(RuntimeError, match=r"not run in the block, although parts of it were: call module\(\.\.\.\)"),
          watch(model, "core.0.hook_out", schedule=SCHEDULE)):
        model.forward(x)
    with (pytest.raises(RuntimeError, match=r"was not run in the block: call module"),
          watch(model, "core.0.hook_out", schedule=SCHEDULE)):
        pass
    assert not n_hooks(model)


def test_an_exception_in_a_hook_passes_and_hooks_are_removed(model, x):
    def fail(value, hook):
        raise ZeroDivisionError(hook.site)

    with (pytest.raises(ZeroDivisionError, match=r"core\.1\.hook_out@2"),
          watch(model, "core.*", schedule=SCHEDULE, fwd_hooks=[("core.1.hook_out@2", fail)])):
        model(x)
    assert not n_hooks(model)
    with watch(model, "core.0.hook_out", schedule=SCHEDULE) as rec:
        try:
            raise KeyError
        except KeyError:  # a forward in an except block is an ordinary one
            model(x)
    assert len(rec) == 4


def test_a_forward_inside_a_forward_is_refused_and_the_outer_one_survives(model, x):
    def calls_the_model(value, hook):
        with pytest.raises(RuntimeError, match="was called from inside its own forward"):
            model(x)

    with watch(model, "core.0.hook_out", schedule=SCHEDULE, fwd_hooks=[("prelude.hook_out", calls_the_model)]) as rec:
        model(x)
    assert torch.equal(rec["core.0.hook_out@3"], by_hand(model, x)["core.0.hook_out@3"])


def test_two_threads_at_once_are_refused(model, x):
    errors = []

    def other():
        try:
            model(x)
        except RuntimeError as error:
            errors.append(str(error))

    def interrupt(value, hook):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with watch(model, "core.0.hook_out", schedule=SCHEDULE, fwd_hooks=[("prelude.hook_out", interrupt)]) as rec:
        model(x)
    assert len(errors) == 1
    assert "from two threads at once" in errors[0]
    assert torch.equal(rec["core.0.hook_out@3"], by_hand(model, x)["core.0.hook_out@3"])


def test_nested_watches_the_inner_one_acting_first(model, x):
    with watch(model, "core.0.hook_out", schedule=SCHEDULE) as outer:
        with watch(model, "core.0.*", fwd_hooks=[("core.0.hook_out@1", lambda v, hook: v * 0)]) as inner:
            model(x)
        assert not outer["core.0.hook_out@1"].any()
        assert torch.equal(inner["core.0.hook_out@3"], outer["core.0.hook_out@3"])
        with watch(model.core[0], "hook_out") as part:
            model(x)
    assert torch.equal(part["hook_out"], outer["core.0.hook_out@3"])  # its own forward, the last of four
    assert not n_hooks(model)


def test_copies_of_a_watched_module_are_refused(model, x):
    with watch(model, "core.0.hook_out", schedule=SCHEDULE) as rec:
        replica = model._replicate_for_data_parallel()  # what DataParallel runs in each thread
        with pytest.raises(RuntimeError, match="the watched module ran as a copy"):
            replica(x)
        with pytest.raises(RuntimeError, match="the watched module ran as a copy"):
            copy.deepcopy(model)(x)
        model(x)
    assert len(rec) == 4

    class Scattering(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return copy.copy(self.inner)(x)

    with (pytest.raises(RuntimeError, match=r"inner\.hook_out ran as a copy"),
          watch(model := Scattering(), "inner.hook_out", schedule={})):
        model(x)


def test_compiled_and_scripted_modules_are_refused(model, x):
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    for watched in (compiled, nn.Sequential(compiled)):
        with (pytest.raises(ValueError, match=r"the module is compiled .* watch and call the original module"),
              watch(watched, None, schedule=SCHEDULE)):
            pass
    with watch(model, "core.0.hook_out", schedule=SCHEDULE) as rec:
        compiled(x)  # a compiled copy of what is watched runs as plain Python in the block
    expected = by_hand(model, x)
    for k in range(4):
        assert torch.equal(rec[f"core.0.hook_out@{k}"], expected[f"core.0.hook_out@{k}"])
    model.compile(backend="eager")
    with pytest.raises(ValueError, match="the module is compiled"), watch(model, None):
        pass


def test_a_module_under_two_names_is_one(x):
    layer = nn.Linear(8, 8)
    model = nn.Sequential(layer, layer, layer)
    with watch(model, "0.hook_out") as rec:
        model(x)
    assert torch.equal(rec["0.hook_out@2"], layer(layer(layer(x))))
    assert discover(model, (x,)).schedule.axes("0") == (("", 3),)
    nested = nn.ModuleDict({"a": model, "b": nn.ModuleList([layer, Looped(), nn.Identity()]), "c": Looped()})
    assert walk(nested) == list(nested.named_modules())
