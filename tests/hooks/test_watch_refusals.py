"""What watch refuses, each with what to do instead; hooks are always removed."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

from hooks.foreign.discovery import discover, modules_of
from hooks.foreign.watching import watch
from hooks.sites import SiteError
from tests.small_looped import SCHEDULE, Looped, Wrapping, by_hand, looped, n_hooks, states


@pytest.fixture
def model():
    return looped()


@pytest.fixture
def x():
    return states()


@pytest.mark.parametrize(("sites", "message"), [
    ("cores.0.hook_out", r"No site is called 'cores\.0\.hook_out'. Nearest: 'core\.0\.hook_out'"),
    ("core.0.hook_out@4", r"cannot fire: core\.0\.hook_out runs 4 loops here, numbered 0\.\.3"),
    ("prelude.hook_out@1", r"'prelude\.hook_out' runs once per forward and takes no '@1'"),
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
          watch(model, ["idle.*", "core.**"], schedule=SCHEDULE)):
        model(x)
    with watch(model, None, schedule=SCHEDULE) as rec:
        model(x)
    assert not any("idle" in site for site in rec)
    with pytest.raises(SiteError, match=r"No site is called 'idle\.hook_out'"):
        rec["idle.hook_out"]


class Talkative(nn.Module):
    def __init__(self):
        super().__init__()
        self.says = Wrapping(lambda h: ("no", None))

    def forward(self, x):
        self.says(x)
        return x


def test_an_output_without_a_tensor_is_refused(x):
    message = (r"says\.hook_out: Wrapping returned a tuple of str, NoneType, in which there is no tensor to record or "
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
          watch(model, "core.**", schedule=SCHEDULE, fwd_hooks=[("core.1.hook_out@2", fail)])):
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
    assert list(modules_of(nested)[0].items()) == [(path, part) for path, part in nested.named_modules()
                                                   if type(part).forward is not nn.Module.forward]
    assert modules_of(nested)[1] == {"a.1": "a.0", "a.2": "a.0", "b.0": "a.0"}
