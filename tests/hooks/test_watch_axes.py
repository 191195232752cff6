"""Whatever layout a module works on, hooks see [batch, pos, d_model]; what is not known is refused, not guessed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooks.edits import ablate, patch, steer
from hooks.foreign.layouts import POSITIONS_FIRST, StateLayout
from hooks.foreign.schedules import UpTo
from hooks.foreign.watching import watch
from hooks.reducers import Mean, Norm
from hooks.sites import SiteError
from tests.small_looped import n_hooks

BATCH, POS, WIDTH, LOOPS = 2, 5, 8, 3


class Loop(nn.Module):
    """A block that runs three times, between transpositions where the block has its positions first."""

    def __init__(self, block: nn.Module, turned: bool = False, tokens: bool = False):
        super().__init__()
        self.core, self.turned = block, turned
        self.embed = nn.Embedding(7, WIDTH) if tokens else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.turned:
            x = x.transpose(0, 1)
        for _ in range(LOOPS):
            x = self.core(x)
            x = x[0] if isinstance(x, tuple) else x
        return x.transpose(0, 1) if self.turned else x


def random_weights(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.eval()


def encoder_layer(batch_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=batch_first)


class Attention(nn.Module):
    def __init__(self, batch_first: bool):
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x, x, x)[0]


KINDS: dict[str, Any] = {
    "encoder layer": (encoder_layer, ""),
    "attention": (Attention, ".attn"),
    "encoder": (lambda first: nn.TransformerEncoder(encoder_layer(first), 2, enable_nested_tensor=False), ""),
    "linear inside": (encoder_layer, ".linear2"),
    "lstm": (lambda batch_first: nn.LSTM(WIDTH, WIDTH, batch_first=batch_first), ""),
    "gru": (lambda batch_first: nn.GRU(WIDTH, WIDTH, batch_first=batch_first), ""),
}


def pair(kind: str) -> tuple[Loop, Loop, str]:
    """A model with its block's positions first, one with its batch first, which compute the same, and a site."""
    make, inner = KINDS[kind]
    return (random_weights(Loop(make(False), turned=True)), random_weights(Loop(make(True))),  # type: ignore[return-value]
            f"core{inner}.hook_out")


def in_place(value: Tensor, hook: Any) -> None:
    value[:, 0] = 0


def states() -> Tensor:
    return torch.randn(BATCH, POS, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_own_modules_are_seen_as_their_batch_first_twins_are(kind: str) -> None:
    first, twin, site = pair(kind)
    x = states()
    options: list[dict[str, Any]] = [{}, {"reduce": Mean("pos")}, {"reduce": Norm()}, {"pos_slice": slice(1, 3)},
                                     {"batch_slice": slice(0, 1)}, {"pos_slice": torch.rand(BATCH, POS) < 0.5}]
    for schedule in ({"core": LOOPS}, {"core": UpTo(5)}):
        for option in options:
            with watch(first, site, schedule=schedule, **option) as rec, torch.no_grad():
                first(x)
            with watch(twin, site, schedule=schedule, **option) as expected, torch.no_grad():
                twin(x)
            assert list(rec) == list(expected)
            for key in rec:
                torch.testing.assert_close(rec[key], expected[key])
            assert rec.to_xarray(site).dims == expected.to_xarray(site).dims
    assert not n_hooks(first)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "encoder"])
@pytest.mark.parametrize("edit", [
    lambda site, rec: ablate(site, at=[0]), lambda site, rec: ablate(site, "mean"),
    lambda site, rec: ablate(site, "resample", seed=1),
    lambda site, rec: steer(site, torch.ones(WIDTH), at=slice(2, 4)),
    lambda site, rec: patch(site, {key: value.flip(0) for key, value in rec.items()}),
    lambda site, rec: (site, lambda value, hook: value * torch.arange(POS)[None, :, None]),
    lambda site, rec: (site, in_place),
], ids=["at", "mean", "resample", "steer", "patch", "function", "in place"])
def test_edits_act_on_what_they_say(kind: str, edit: Any) -> None:
    first, twin, site = pair(kind)
    x, site = states(), f"{site}@1"
    results = []
    for model in (first, twin):
        with torch.no_grad():
            with watch(model, site, schedule={"core": LOOPS}) as rec:
                plain = model(x)
            with watch(model, (), schedule={"core": LOOPS}, fwd_hooks=[edit(site, rec)]):
                results.append(model(x))
        assert not torch.equal(results[-1], plain)
    torch.testing.assert_close(results[0], results[1], atol=1e-3, rtol=1e-3)  # rounding differs, and grows over loops


def test_gradients_have_the_layout_of_states() -> None:
    first, twin, site = pair("encoder layer")
    found = []
    for model in (first, twin):
        with watch(model, site, schedule={"core": LOOPS}, gradients=True) as rec:
            model(states()).square().sum().backward()
        found.append(rec.gradients.stack(site))
    assert found[0].shape == (LOOPS, BATCH, POS, WIDTH)
    torch.testing.assert_close(found[0], found[1])


def test_the_watched_module_may_be_one_of_torchs_own() -> None:
    layer = random_weights(encoder_layer(False))
    x = states().transpose(0, 1)
    with watch(layer, ["hook_in", "linear1.hook_out"], reduce=Mean("pos")) as rec, torch.no_grad():
        layer(x)
    torch.testing.assert_close(rec["hook_in"], x.mean(0))
    with (pytest.raises(ValueError, match=r"axes=\('batch', .*\) is declared, and TransformerEncoderLayer works on"),
          watch(layer, axes=("batch", "pos", "d_model"), schedule={})):
        pass
    with watch(layer, "hook_in", reduce=Mean("pos")) as rec, torch.no_grad():
        layer(x[:, 0])  # [pos, d_model], without a batch
    torch.testing.assert_close(rec["hook_in"], x[:, 0].mean(0)[None])


# -------------------------------------------------------------------------- declared


class Mixing(nn.Module):
    """Mixes positions, which it has first."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(POS, POS, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("pbd,qp->qbd", x, self.mix) if x.ndim == 3 else torch.tanh(x)


@pytest.mark.parametrize("axes", [{"core.**": POSITIONS_FIRST}, {"hook_in": ("batch", "pos", "d_model"),
                                                                "**": POSITIONS_FIRST}])
def test_a_layout_declared_by_site(axes: Any) -> None:
    model, x = Loop(Mixing(), turned=True), states()
    with (pytest.raises(ValueError, match=r"core\.hook_in has shape .* and axes= declares .* or declare axes by site"),
          watch(model, "core.hook_in", schedule={"core": LOOPS}, axes=POSITIONS_FIRST)):
        model(x)  # turns them inside, so that not all states are so
    with watch(model, "core.hook_in", schedule={"core": LOOPS}, axes=axes, reduce=Mean("pos"),
               fwd_hooks=[ablate("core.hook_out@0", at=[0])]) as rec, torch.no_grad():
        model(x)
    once = torch.einsum("bpd,qp->bqd", x, model.core.mix).detach()
    once[:, 0] = 0
    torch.testing.assert_close(rec["core.hook_in@0"], x.mean(1))
    torch.testing.assert_close(rec["core.hook_in@1"], once.mean(1))


def test_a_layout_declared_for_all_states() -> None:
    model, x = Loop(Mixing()), states().transpose(0, 1)
    with watch(model, None, schedule={"core": LOOPS}, axes=POSITIONS_FIRST,
               fwd_hooks=[ablate("core.hook_out@2", at=[0])]) as rec, torch.no_grad():
        out = model(x)
    assert not out[0].any()
    assert torch.equal(rec["hook_in"], x.transpose(0, 1))
    assert torch.equal(rec["hook_out"], out.transpose(0, 1))
    assert rec.stack("core.hook_in").shape == (LOOPS, BATCH, POS, WIDTH)


def test_states_without_positions_have_one() -> None:
    model = Loop(nn.Tanh())
    x = torch.randn(4, WIDTH)
    with watch(model, "core.hook_out", schedule={"core": LOOPS}, axes=("batch", "d_model"),
               fwd_hooks=[ablate("core.hook_out@1", at=[0])]) as rec:
        out = model(x)
    assert rec.stack("core.hook_out").shape == (LOOPS, 4, 1, WIDTH)
    assert rec.to_xarray("core.hook_out").dims == ("loop", "batch", "pos", "d_model")
    assert torch.equal(rec["core.hook_out@0"][:, 0], x.tanh())
    assert out.shape == (4, WIDTH)
    assert not out.any()
    cell = Loop(nn.GRUCell(WIDTH, WIDTH))
    with watch(cell, "core.hook_out", schedule={"core": LOOPS}, batch_slice=slice(0, 2)) as rec:
        cell(x)
    assert rec["core.hook_out@0"].shape == (2, 1, WIDTH)


@pytest.mark.parametrize("own", [("pos", "batch", "d_model"), ("batch", "d_model"), ("pos", "d_model"), ("d_model",),
                                 ("head", "pos", "batch", "d_head"), ("batch", "query", "key"),
                                 ("d_model", "pos", "batch")])
def test_a_layout_is_turned_there_and_back(own: tuple[str, ...]) -> None:
    layout = StateLayout(own)
    state = torch.randn(*range(2, 2 + len(own)))
    seen = layout.canonical(state)
    assert layout.axes[0] == "batch"
    assert len(layout.axes) == seen.ndim
    assert "pos" not in own or layout.axes[1] == "pos"
    assert [seen.shape[layout.axes.index(axis)] for axis in own] == list(state.shape)
    assert torch.equal(layout.original(seen), state)
    assert seen.data_ptr() == state.data_ptr()  # a view: what a hook writes in place is written


# ------------------------------------------------------------------- contradictions


def tokens() -> Tensor:
    return torch.randint(0, 7, (BATCH, POS))


@pytest.mark.unchecked
def test_a_declaration_that_contradicts_the_input_is_an_error() -> None:
    model = Loop(nn.Tanh(), tokens=True)
    with (pytest.raises(RuntimeError, match=r"axes=\('batch', 'd_model'\) declares 2 axes, and no state .*: core"),
          watch(model, "core.hook_out", schedule={"core": LOOPS}, axes=("batch", "d_model"))):
        model(tokens())
    with (pytest.raises(ValueError, match=r"hook_out has shape \[2, 5, 8\], and axes= declares batch × d_model for it"),
          watch(model, "core.hook_out", schedule={"core": LOOPS}, axes={"core.*": ("batch", "d_model")})):
        model(tokens())
    for wrong in ("pos", (), ("pos", "pos", "d_model")):
        with pytest.raises(ValueError, match="axes are different names, one for each axis"), watch(model, axes=wrong):
            pass


@pytest.mark.parametrize("given", [tokens, states])
def test_a_module_of_torch_that_is_given_its_batch_first_is_an_error(given: Any) -> None:
    model = random_weights(Loop(encoder_layer(False), tokens=given is tokens))  # forgot batch_first=True
    message = (r"core\.hook_out has shape \[2, 5, 8\], and TransformerEncoderLayer at 'core' works on "
               r"\(batch_first=False\) pos × batch × d_model; but the input has batch 2 and pos 5")
    with (pytest.raises(ValueError, match=message),
          watch(model, "core.hook_out", schedule={"core": LOOPS}, axes=("batch", "pos", "d_model"))):
        model(given())


def test_an_undeclared_layout_that_the_shape_contradicts_is_unknown() -> None:
    model = Loop(Mixing(), turned=True, tokens=True)
    with watch(model, "core.hook_out", schedule={"core": LOOPS}) as rec:
        model(tokens())
    assert rec.to_xarray("core.hook_out").dims == ("loop", "axis_0", "axis_1", "axis_2")
    for refusing, message in (({"reduce": Mean("pos")}, "has nothing to reduce .*whose axes are axis_0, axis_1, axis_"),
                              ({"pos_slice": slice(0, 1)}, "which of its axes is the batch is not known: give watch"),
                              ({"batch_slice": slice(0, 1)}, "which of its axes is the batch is not known"),
                              ({"fwd_hooks": [ablate("core.hook_out", at=[0])]}, "no position axis that is known"),
                              ({"fwd_hooks": [ablate("core.hook_out", "mean")]}, "which of its axes is the batch"),
                              ({"fwd_hooks": [ablate("core.hook_out", "resample")]}, "which of its axes is the batch")):
        with (pytest.raises(ValueError, match=message),
              watch(model, "core.hook_out", schedule={"core": LOOPS}, **refusing)):
            model(tokens())


def test_a_module_around_one_with_positions_first_is_not_guessed_at() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = encoder_layer(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = random_weights(Loop(Wrapper()))
    with (pytest.raises(ValueError, match="has nothing to reduce"),
          watch(model, "core.hook_out", schedule={"core": LOOPS}, reduce=Mean("pos"))):
        model(states().transpose(0, 1))
    with watch(model, "core.hook_out", schedule={"core": LOOPS}, reduce=Mean("pos"), axes=POSITIONS_FIRST) as rec:
        out = model(states().transpose(0, 1))
    torch.testing.assert_close(rec["core.hook_out@-1"], out.detach().mean(0))


def test_a_sequence_length_that_changes_between_forwards() -> None:
    model = Loop(Mixing(), turned=True, tokens=True)
    with watch(model, "core.hook_in@0", schedule={"core": LOOPS}, axes={"core.*": POSITIONS_FIRST},
               reduce=Mean("pos")) as rec:
        for batch in (3, 1, 2):
            model(torch.randint(0, 7, (batch, POS)))
            assert rec["core.hook_in@0"].shape == (batch, WIDTH)
        with pytest.raises(SiteError):
            rec["core.hook_in@1"]
