"""What a wildcard finds and cannot be recorded is left out and said, and does not stop the watch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooks.edits import steer
from hooks.foreign.loopify import loopify
from hooks.foreign.schedules import UpTo
from hooks.foreign.watching import watch
from hooks.reducers import ChangeFromPrevious
from hooks.sites import SiteError
from tests.small_looped import n_hooks, states


class Block(nn.Module):
    """Attention and MLP that share one Dropout."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.attn, self.mlp, self.drop = nn.Linear(width, width), nn.Linear(width, width), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(x))
        return x + self.drop(self.mlp(x))


class Model(nn.Module):
    def __init__(self, n_loops: int = 3) -> None:
        super().__init__()
        self.n_loops, self.core, self.coda = n_loops, Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.n_loops):
            x = self.core(x)
        return self.coda(x)


def model(n_loops: int = 3) -> Model:
    torch.manual_seed(0)
    return Model(n_loops).eval()


SCHEDULE = {"core": 3}
SITES = {f"core.{part}hook_out@{k}" for part in ("", "attn.", "mlp.") for k in range(3)}


# ---------------------------------------------------------- a module run twice per pass


@pytest.mark.parametrize("pattern", [None, "**", "**.hook_out", lambda name: "hook" in name])
@pytest.mark.parametrize("schedule", [SCHEDULE, {"core": UpTo(7)}], ids=["declared", "up to"])
def test_a_shared_dropout_is_left_out_and_the_rest_recorded(pattern: Any, schedule: Any) -> None:
    looped, x = model(), states()
    with watch(looped, pattern, schedule=schedule) as rec:
        out = looped(x)
    assert set(rec) >= {*SITES, "coda.mlp.hook_out"}
    assert torch.equal(rec["coda.hook_out"], out)
    assert not [site for site in rec if "drop" in site]
    assert {"core.drop.hook_out", "coda.drop.hook_out"} <= set(rec.left_out)
    with pytest.raises(SiteError, match=r"core\.drop ran 2 times in one loop of core, so that its calls cannot be "
                                        r"told apart by loop\. .* Schedule\(\{'core\.drop': \{'k': \d, 'c': 2\}\}"):
        rec["core.drop.hook_out@1"]
    with pytest.raises(SiteError, match=r"coda\.drop ran 2 times, .*Schedule\(\{'coda\.drop': 2\}\)"):
        rec.stack("coda.drop.hook_out")
    assert not n_hooks(looped)


def test_the_declaration_that_the_message_names_makes_every_call_a_site() -> None:
    looped = model()
    with watch(looped, None, schedule={"core": 3, "core.drop": {"k": 3, "c": 2}, "coda.drop": 2}) as rec:
        looped(states())
    assert rec.left_out == {}
    assert rec.stack("core.drop.hook_out").shape[:2] == (3, 2)
    assert torch.equal(rec["core.drop.hook_out@k1.c1"], rec["core.mlp.hook_out@1"])
    assert torch.equal(rec["coda.drop.hook_out@0"], rec["coda.attn.hook_out"])
    with watch(looped) as found:  # discovered
        looped(states())
    assert torch.equal(found["core.drop.hook_out@i1.j1"], rec["core.mlp.hook_out@1"])
    assert torch.equal(found["coda.drop.hook_out@1"], rec["coda.mlp.hook_out"])


def test_named_alone_it_is_an_error() -> None:
    looped = model()
    edit = ("core.drop.hook_out@1", lambda value, hook: value)
    for sites, hooks in (("core.drop.hook_out", []), ("core.drop.*", []), ((), [edit])):
        with (pytest.raises(RuntimeError, match=r"core\.drop ran 2 times in one loop of core"),
              watch(looped, sites, schedule=SCHEDULE, fwd_hooks=hooks)):
            looped(states())
    assert not n_hooks(looped)


def test_an_edit_by_wildcard_acts_on_every_call_in_its_loop() -> None:
    looped, x = model(), states()
    seen: list[str] = []

    def note(value: Tensor, hook: Any) -> Tensor:
        seen.append(hook.site)
        return value + 1 if "drop" in hook.name else value

    with watch(looped, "coda.hook_in", schedule=SCHEDULE, fwd_hooks=[("core.**.hook_out@1", note)]) as rec:
        looped(x)
    assert seen.count("core.drop.hook_out@1") == 2
    assert len(seen) == 5
    state = looped.core(x)
    state = state + looped.core.attn(state) + 1
    state = state + looped.core.mlp(state) + 1
    torch.testing.assert_close(rec["coda.hook_in"], looped.core(state))


def test_gradients_and_reducers_of_the_rest() -> None:
    looped = model()
    with watch(looped, "core.**.hook_out", schedule=SCHEDULE, gradients=True) as rec:
        looped(states()).sum().backward()
    assert set(rec.gradients) == set(rec) == SITES
    with watch(looped, "**.hook_out@*", schedule=SCHEDULE, reduce=ChangeFromPrevious()) as rec:
        looped(states())
    assert not rec["core.hook_out@1"].isnan().any()
    with watch(looped, None, schedule=SCHEDULE, fwd_hooks=[steer("**.hook_out", torch.zeros(8))]) as rec:
        assert torch.equal(looped(states()), looped(states()))


def test_a_wrong_number_of_loops_is_an_error_by_wildcard_too() -> None:
    looped = model(4)
    with (pytest.raises(RuntimeError, match=r"core should run 3 times per forward by the schedule, and has now run 4"),
          watch(looped, None, schedule=SCHEDULE)):
        looped(states())
    with (pytest.raises(RuntimeError, match=r"core should run 5 times per forward by the schedule, and ran 4 times"),
          watch(looped, "core.attn.hook_out", schedule={"core": 5})):
        looped(states())
    with (pytest.raises(RuntimeError, match=r"'core\.\*': nothing that this names can be recorded or edited\. core"),
          watch(looped, "core.*", schedule={"coda": 1})):
        looped(states())


# --------------------------------------------------------- a module without a tensor


class Talking(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return "so", {"much": 3}


class WithTalk(Model):
    def __init__(self) -> None:
        super().__init__()
        self.says, self.silent = Talking(), nn.ModuleDict({"inner": Nothing()})

    def forward(self, x: Tensor) -> Tensor:
        self.says(x)
        self.silent["inner"]()
        return super().forward(x)


class Nothing(nn.Module):
    def forward(self) -> None:
        return None


@pytest.mark.parametrize("schedule", [SCHEDULE, None], ids=["declared", "discovered"])
@pytest.mark.parametrize("sites", [None, "**", ["core.hook_out", "s*.**"]])
def test_a_module_that_gives_no_tensor_is_left_out_of_what_a_wildcard_found(schedule: Any, sites: Any) -> None:
    torch.manual_seed(0)
    looped = WithTalk().eval()
    with watch(looped, sites, schedule=schedule) as rec:
        looped(states())
    assert "says.hook_in" in rec
    assert len(rec.stack("core.hook_out")) == 3
    assert {"says.hook_out", "silent.inner.hook_in", "silent.inner.hook_out"} <= set(rec.left_out)
    with pytest.raises(SiteError, match=r"says\.hook_out: Talking returned a tuple of str, dict, in which there is no"):
        rec["says.hook_out"]
    with pytest.raises(TypeError, match=r"says\.hook_out"), watch(looped, "says.hook_out", schedule=schedule):
        looped(states())


# ------------------------------------------------------------------ a loop of one, aliases


def test_loop_0_may_be_named_where_there_is_one_loop() -> None:
    looped = model(1)
    for schedule in ({"core": 1}, {"core": UpTo(4)}, None):
        with watch(looped, "core.hook_out@0", schedule=schedule,
                   fwd_hooks=[("core.attn.hook_out@0", lambda value, hook: value * 0)]) as rec:
            looped(states())
        assert torch.equal(rec["core.hook_out@0"], rec["core.hook_out@-1"])
        assert torch.equal(rec["core.hook_out@0"], rec["core.hook_out"])
    layers = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3))})
    layers.forward = lambda x: [x := layer(x) for layer in layers["layers"]][-1]  # type: ignore[method-assign]
    with loopify(layers, (1, 1), 1), watch(layers, "layers.1.hook_out@0") as rec:
        layers(states())
    assert len(rec) == 1


class Tied(nn.Module):
    """One layer under four names, two of them in a list; and a part of it under a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        layer = Block()
        self.layers = nn.ModuleList([layer] * 3)
        self.core = layer
        self.head = layer.mlp

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@pytest.mark.parametrize("schedule", [{"layers": 3, "layers.0.mlp": 4}, {"core": 3, "core.mlp": 4}, None],
                         ids=["declared", "declared under the other name", "discovered"])
def test_a_module_may_be_named_by_each_of_its_paths(schedule: Any) -> None:
    torch.manual_seed(0)
    tied = Tied().eval()
    with watch(tied, ["core.hook_out", "layers.2.attn.hook_out@1", "head.hook_out"], schedule=schedule) as rec:
        out = tied(states())
    assert set(rec) == {*(f"layers.0.hook_out@{k}" for k in range(3)), "layers.0.attn.hook_out@1",
                                           *(f"layers.0.mlp.hook_out@{k}" for k in range(4))}
    assert torch.equal(rec["core.hook_out@1"], rec["layers.1.hook_out@1"])
    assert torch.equal(rec["head.hook_out@-1"], out)
    assert rec.stack("layers.2.hook_out").shape[0] == 3
    assert rec.to_xarray("head.hook_out").sizes["loop"] == 4
    with watch(tied, "layers.*.hook_out", schedule=schedule) as rec:
        tied(states())
    assert len(rec) == 3
    with (pytest.raises(ValueError, match=r"loops 'layers\.0' and 'core' differently, and they are one module"),
          watch(tied, schedule={"layers": 3, "core": 2})):
        pass


def test_one_star_stays_inside_a_part() -> None:
    looped = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(4))}).eval()
    looped.forward = lambda x: [x := layer(x) for layer in looped["layers"]][-1]  # type: ignore[method-assign]
    with watch(looped, "layers.*.hook_out", schedule={}) as rec:
        looped(states())
    assert len(rec) == 4
    with pytest.raises(SiteError, match=r"A '\*' stays inside one dotted part: 'layers\.\*\*' crosses"):
        watch(looped, "layers.*", schedule={}).__enter__()
