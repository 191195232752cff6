"""Loops are counted by the looped module around a site, and what the data leave out is absent, never misnumbered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooks.edits import ablate, freeze, steer
from hooks.foreign.discovery import discover
from hooks.foreign.schedules import InLoopsOf, Schedule, UpTo
from hooks.foreign.watching import watch
from hooks.reducers import Norm
from hooks.sites import SiteError
from tests.small_looped import Looped, by_hand, looped, n_hooks, states


class Marked(nn.Module):
    """Returns the number of the loop, which the model tells it, so that an activation says when it was."""

    def forward(self, x: Tensor, k: int) -> Tensor:
        return torch.full_like(x, float(k))


class Routed(nn.Module):
    """A looped block that sends loop k to the expert ``route[k]``, and runs a branch in even loops only."""

    def __init__(self, route: tuple[int, ...]):
        super().__init__()
        self.route = route
        self.experts = nn.ModuleList(Marked() for _ in range(3))
        self.even = Branch()

    def forward(self, x: Tensor, k: int) -> Tensor:
        x = self.experts[self.route[k]](x, k)
        return x + self.even(x, k) if k % 2 == 0 else x


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Marked()

    def forward(self, x: Tensor, k: int) -> Tensor:
        return self.inner(x, k)


class Model(nn.Module):
    """The routed block five times, and beside it a branch of odd loops."""

    def __init__(self, route: tuple[int, ...] = (0, 1, 1, 0, 1)):
        super().__init__()
        self.core = Routed(route)
        self.odd = Branch()

    def forward(self, x: Tensor) -> Tensor:
        for k in range(len(self.core.route)):
            x = self.core(x, k)
            if k % 2:
                x = x + self.odd(x, k)
        return x


X = torch.zeros(2, 3, 4)
DECLARED = {"core": 5, "odd": InLoopsOf("core")}


def firsts(rec: Any) -> dict[str, float]:
    return {site: float(value.flatten()[0]) for site, value in rec.items()}


# ------------------------------------------------------------- by the module around


@pytest.mark.parametrize("schedule", [{"core": 5}, {"core": UpTo(9)}, None], ids=["declared", "up to", "discovered"])
def test_a_routed_expert_has_the_number_of_the_loop_that_it_ran_in(schedule: Any) -> None:
    model = Model()
    with watch(model, "core.experts.*.hook_out", schedule=schedule) as rec:
        model(X)
    assert firsts(rec) == {f"core.experts.{e}.hook_out@{k}": float(k) for k, e in enumerate(model.core.route)}
    assert rec.stack("core.experts.1.hook_out")[:, 0, 0, 0].tolist() == [1, 2, 4]
    assert rec.to_xarray("core.experts.0.hook_out").coords["loop"].values.tolist() == [0, 3]
    assert float(rec["core.experts.1.hook_out@-1"].max()) == 4
    with pytest.raises(SiteError, match=r"this run does not come to it.*experts\.0\.hook_out runs in '.*@0', '.*@3'"):
        rec["core.experts.0.hook_out@1"]
    assert not n_hooks(model)


@pytest.mark.parametrize("schedule", [{"core": 5}, None], ids=["declared", "discovered"])
def test_a_branch_of_even_loops_and_what_is_inside_it(schedule: Any) -> None:
    model = Model()
    edits = [("core.even.inner.hook_out@2", lambda value, hook: value + 100)]
    with watch(model, ["core.even.inner.hook_out", "core.even.hook_out"], schedule=schedule, fwd_hooks=edits) as rec:
        model(X)
    assert firsts(rec) == {f"core.even{inner}.hook_out@{k}": k + 100.0 * (k == 2)
                           for k in (0, 2, 4) for inner in (".inner", "")}


def test_a_branch_beside_the_looped_module_is_numbered_by_declaration() -> None:
    model = Model()
    with watch(model, "odd.**.hook_out", schedule=DECLARED) as rec:
        model(X)
    assert firsts(rec) == {f"odd{inner}.hook_out@{k}": float(k) for k in (1, 3) for inner in (".inner", "")}
    with (pytest.raises(RuntimeError, match=r"odd should run 5 times per forward by the schedule, and ran 2 times"),
          watch(model, "odd.hook_out", schedule={"core": 5, "odd": 5})):
        model(X)
    with (pytest.raises(ValueError, match=r"gives 'odd' the loops of 'cor', which is the end of 0 paths"),
          watch(model, schedule={"core": 5, "odd": InLoopsOf("cor")})):
        pass


class Twice(nn.Module):
    """A looped block that calls its layer a number of times that changes, and once more after the loops."""

    def __init__(self, calls: tuple[int, ...], after: int = 0):
        super().__init__()
        self.calls, self.after = calls, after
        self.core = nn.ModuleDict({"block": Calling(calls)})

    def forward(self, x: Tensor) -> Tensor:
        block = self.core["block"]
        for k in range(len(self.calls)):
            x = block(x, k)
        for _ in range(self.after):
            x = block.layer(x, 9)
        return x


class Calling(nn.Module):
    def __init__(self, calls: tuple[int, ...]):
        super().__init__()
        self.calls, self.layer = calls, Marked()

    def forward(self, x: Tensor, k: int) -> Tensor:
        for i in range(self.calls[k]):
            x = self.layer(x, 10 * k + i)
        return x


@pytest.mark.parametrize(("schedule", "letters"), [
    ({"core": 3, "block.layer": {"k": 3, "c": 3}}, "kc"), ({"core": 3, "block.layer": {"k": 3, "c": UpTo(5)}}, "kc"),
    ({"core": UpTo(5), "block.layer": {"k": UpTo(5), "c": UpTo(5)}}, "kc"), (None, "ij")],
    ids=["declared", "up to", "both up to", "discovered"])
def test_calls_inside_a_looped_module_are_counted_anew_in_each_of_its_calls(schedule: Any, letters: str) -> None:
    site, (outer, inner) = "core.block.layer.hook_out", letters
    model = Twice((2, 3, 1))
    with watch(model, site, schedule=schedule) as rec:
        model(X)
    assert firsts(rec) == {f"{site}@{outer}{k}.{inner}{i}": 10.0 * k + i
                           for k, n in enumerate((2, 3, 1)) for i in range(n)}
    with pytest.raises(SiteError, match="ran in 6 of 3 × 3 cycles, which are no block to be stacked"):
        rec.stack(site)
    model = Twice((2, 2))
    with watch(model, site) as rec:
        model(X)
    assert rec.stack(site).shape == (2, 2, *X.shape)


def test_a_module_that_also_runs_after_the_loops_is_not_taken_for_the_last_loop() -> None:
    model = Twice((1, 1, 1), after=1)
    with (pytest.raises(RuntimeError, match=r"core\.block\.layer ran outside of core\.block too"),
          watch(model, "core.block.layer.hook_out", schedule={"core": 3})):
        model(X)
    with watch(model, "core.**.hook_out", schedule={"core": 3}) as rec:
        model(X)
    assert [site for site in rec if "layer" in site] == []
    assert "ran outside of core.block too" in rec.left_out["core.block.layer.hook_out"]
    with watch(model, "core.block.layer.hook_out") as rec:  # discovered: by its own calls, all of them
        model(X)
    assert [float(value.max()) for value in rec.values()] == [0, 10, 20, 9]


def test_an_inner_number_that_is_open_needs_a_module_to_count_it_in() -> None:
    with (pytest.raises(ValueError, match=r"leaves open how often an inner cycle of 'core\.0' runs, and no module"),
          watch(looped(), schedule={"core": {"h": 2, "l": UpTo(3)}})):
        pass


def test_discovery_finds_what_is_around_what() -> None:
    axes = discover(Twice((2, 3, 1)), (X,)).schedule.axes
    assert (axes("core.block"), axes("core.block.layer"), axes("")) == ((("", 3),), (("i", 3), ("j", 3)), ())


# ----------------------------------------------------------------------- up to N


class Halting(nn.Module):
    """Loops until the state has grown past a bound: how often depends on the input, and on edits."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.ModuleList([nn.Identity(), nn.Identity()])
        self.coda = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        while x.max() < 6:
            for layer in self.core:
                x = layer(x) + 0.5
        return self.coda(x)


def start(loops: int) -> Tensor:
    return torch.full((2, 3, 4), 6.0 - loops)


def test_batches_with_four_and_six_loops_in_one_watch() -> None:
    model, seen = Halting(), []
    with watch(model, ["core.*.hook_out", "coda.hook_out"], schedule={"core": UpTo(16)},
               on_forward=seen.append) as rec:
        for loops in (4, 6, 0):
            model(start(loops))
    four, six, none = seen
    for recording, loops in ((four, 4), (six, 6)):
        assert recording.stack("core.1.hook_out")[:, 0, 0, 0].tolist() == [6.0 - loops + k + 0.5 for k in range(loops)]
        assert float(recording["core.0.hook_out@-1"].max()) == 5
        assert recording.to_xarray("core.0.hook_out").sizes["loop"] == loops
        assert recording.absent == ()
    with pytest.raises(SiteError, match=r"'core\.0\.hook_out@4' cannot fire: core\.0\.hook_out runs 4 loops here"):
        four["core.0.hook_out@4"]
    assert list(none) == ["coda.hook_out"] == list(rec)


def test_only_the_last_loops_are_kept_where_they_are_asked_for() -> None:
    model = Halting()
    for loops in (4, 6, 1):
        with watch(model, ["core.0.hook_out@-2:", "core.1.hook_out@-1", "core.1.hook_out@0"],
                   schedule={"core": UpTo(16)}, reduce=Norm()) as rec:
            model(start(loops))
        assert set(rec) == {*(f"core.0.hook_out@{k}" for k in range(loops)[-2:]),
                            "core.1.hook_out@0", f"core.1.hook_out@{loops - 1}"}


def test_an_edit_at_a_loop_that_never_came_is_reported_and_stops_nothing() -> None:
    model = Halting()
    edits = [("core.0.hook_out@9", lambda value, hook: value * 0), ablate("core.1.hook_out@2:6")]
    with watch(model, "core.0.hook_out", schedule={"core": UpTo(16)}, fwd_hooks=edits) as rec:
        model(start(2))
        assert rec.absent == ("core.0.hook_out@9", *(f"core.1.hook_out@{k}" for k in range(2, 6)))
        assert len(rec) == 2
    for edit in (("core.0.hook_out@-1", lambda value, hook: value), freeze(-2, "core.0.hook_out")):
        with (pytest.raises(SiteError, match=r"runs up to 16 loops, and which is the last is known only when"),
              watch(model, (), schedule={"core": UpTo(16)}, fwd_hooks=[edit])):
            pass


def test_an_edit_that_changes_when_the_model_halts() -> None:
    model = Halting()
    for sooner, loops in ((2.0, 4), (-2.0, 8)):
        with watch(model, "core.*.hook_in", schedule={"core": UpTo(16)},
                   fwd_hooks=[steer("core.1.hook_out@1", sooner * torch.ones(4))]) as rec:
            model(start(6))
        assert len(rec.stack("core.0.hook_in")) == loops
    with (pytest.raises(RuntimeError, match=r"core\.1 should run 6 times .* A number that depends on the data is"),
          watch(model, "core.1.hook_out", fwd_hooks=[("core.1.hook_out@1", lambda value, hook: value + 2)])):
        model(start(6))


def test_gradients_of_the_loops_that_came() -> None:
    model, x = looped(), states()
    seen = by_hand(model, x, 3)
    expected = torch.autograd.grad(seen["coda.hook_out"].square().sum(), seen["core.0.hook_out@2"])[0]
    with watch(model, "core.0.hook_out@-1", schedule={"core": UpTo(5)}, gradients=True) as rec:
        model(x, 3).square().sum().backward()
    assert list(rec.gradients) == ["core.0.hook_out@2"]
    torch.testing.assert_close(rec.gradients["core.0.hook_out@-1"], expected)


def test_more_loops_than_the_bound_are_an_error() -> None:
    model = Looped()
    with (pytest.raises(RuntimeError, match=r"core\.0 should run up to 3 times per .*, and has now run 4 times"),
          watch(model, "core.*.hook_out", schedule={"core": UpTo(3)})):
        model(states())
    with pytest.raises(ValueError, match="whole numbers of at least 1, not 0"):
        Schedule({"core": UpTo(0)})


def test_an_outer_number_that_is_open_with_an_inner_one_that_is_not() -> None:
    model = looped()
    with watch(model, "core.0.hook_out", schedule={"core": {"h": UpTo(5), "l": 2}}) as rec:
        model(states(), 6)
    assert rec.stack("core.0.hook_out").shape[:2] == (3, 2)
    with (pytest.raises(RuntimeError, match=r"core\.0 should run up to 10 times .*, and ran 5 times"),
          watch(model, "core.0.hook_out", schedule={"core": {"h": UpTo(5), "l": 2}})):
        model(states(), 5)


def test_an_expert_that_no_token_takes_is_absent_only_where_that_is_declared() -> None:
    model = Model()
    site = "core.experts.2.hook_out"
    with (pytest.raises(RuntimeError, match=r"core\.experts\.2 should run 5 times per forward .*, and ran 0 times"),
          watch(model, site, schedule={"core": 5})):
        model(X)
    with (pytest.raises(RuntimeError, match=r"did not come to core\.experts\.0\.hook_out@1: .* some of the loops"),
          watch(model, (), schedule={"core": 5}, fwd_hooks=[("core.experts.0.hook_out@1", lambda v, hook: v)])):
        model(X)
    with watch(model, site, schedule={"core": 5, "core.experts": UpTo(5)},
               fwd_hooks=[(f"{site}@3", lambda value, hook: value * 0)]) as rec:
        model(X)
    assert (list(rec), rec.absent) == ([], (f"{site}@3",))
    with watch(model, "core.experts.*.hook_out", schedule={"core": UpTo(9), "core.experts": UpTo(9)}) as rec:
        model(X)
    assert firsts(rec) == {f"core.experts.{e}.hook_out@{k}": float(k) for k, e in enumerate(model.core.route)}
    with (pytest.raises(ValueError, match=r"'core\.experts\.0' is inside 'core', which loops 5 times, .* UpTo\(5\) if"),
          watch(model, site, schedule={"core": 5, "core.experts": UpTo(3)})):
        pass
