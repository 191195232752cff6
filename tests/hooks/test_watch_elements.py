"""Elements of what modules take and return are sites: attention weights, carries of two states, memories of RNNs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hooks.edits import ablate, freeze, patch
from hooks.foreign import payload
from hooks.foreign.discovery import describe
from hooks.foreign.loopify import loopify
from hooks.foreign.schedules import UpTo
from hooks.foreign.watching import watch
from hooks.reducers import Entropy, Mean
from hooks.sites import SiteError
from tests.small_looped import n_hooks, states

TOKENS = torch.randint(0, 30, (2, 6), generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------- attention weights per loop


@pytest.fixture(scope="module")
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, initializer_range=0.3, attn_implementation="eager")).eval()


@pytest.fixture(scope="module")
def albert() -> Any:
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(0)
    return AlbertForMaskedLM(AlbertConfig(
        vocab_size=30, embedding_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, initializer_range=0.3, attn_implementation="eager")).eval()


@torch.no_grad()
def test_attention_weights_of_an_eager_model_of_transformers_in_every_loop(albert: Any) -> None:
    site = "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.hook_out.1"
    expected = albert(TOKENS, output_attentions=True).attentions
    with watch(albert, ["**.attention.hook_out.1", "**.attention.hook_out"]) as rec:
        albert(TOKENS)
    assert rec.stack(site).shape == (3, 2, 2, 6, 6)
    for k, weights in enumerate(expected):
        assert torch.equal(rec[f"{site}@{k}"], weights)
    assert rec.to_xarray(site).dims == ("loop", "batch", "head", "query", "key")
    assert rec[f"{site[:-2]}@0"].shape == (2, 6, 16)
    with watch(albert, site, reduce=Entropy(), pos_slice=slice(0, 4)) as entropy:
        albert(TOKENS)
    assert entropy.to_xarray(site).dims == ("loop", "batch", "head", "query")
    torch.testing.assert_close(entropy[f"{site}@2"], torch.special.entr(expected[2]).sum(-1)[:, :, :4])


@torch.no_grad()
def test_attention_weights_of_a_loopified_model(llama: Any) -> None:
    with loopify(llama, (1, 2), 3), watch(llama, "model.layers.*.self_attn.hook_out.1") as rec:
        llama(TOKENS, use_cache=False)
    assert len(rec) == 1 + 3 + 3 + 1
    stacked = rec.stack("model.layers.2.self_attn.hook_out.1")
    torch.testing.assert_close(stacked.sum(-1), torch.ones(3, 2, 2, 6))
    assert not torch.equal(stacked[0], stacked[2])
    llama.set_attn_implementation("sdpa")
    try:
        with (pytest.raises(TypeError, match=r"returned a tuple of Tensor, NoneType, in which \.1 is no tensor; there "
                                             r"are \.0\. Attention weights are returned by eager attention only: load"),
              watch(llama, "model.layers.0.self_attn.hook_out.1")):
            llama(TOKENS)
        with (pytest.raises(RuntimeError, match=r"nothing that this names can be recorded or edited\. model\.layers"),
              watch(llama, ["model.layers.*.self_attn.hook_out.1", "model.layers.*.hook_out"])):
            llama(TOKENS)
    finally:
        llama.set_attn_implementation("eager")


class SelfAttention(nn.Module):
    """A block of torch's attention, its weights returned but not used."""

    def __init__(self, per_head: bool, batch_first: bool):
        super().__init__()
        self.attn, self.per_head = nn.MultiheadAttention(8, 2, batch_first=batch_first), per_head

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, value=x, average_attn_weights=not self.per_head)[0]


class Loop(nn.Module):
    def __init__(self, core: nn.Module):
        super().__init__()
        self.core = core

    def forward(self, x: Any) -> Any:
        for _ in range(3):
            x = self.core(x)
        return x


@pytest.mark.parametrize("batch_first", [True, False])
@torch.no_grad()
def test_weights_and_inputs_of_torchs_attention(batch_first: bool) -> None:
    torch.manual_seed(0)
    model, x = Loop(SelfAttention(True, batch_first)).eval(), states()
    x = x if batch_first else x.transpose(0, 1)
    names = ["core.attn.hook_out.1", "core.attn.hook_in.1", "core.attn.hook_in.value", "core.attn.hook_in.query"]
    with watch(model, names, schedule={"core": 3}) as rec:
        model(x)
    assert rec.to_xarray(names[0]).dims == ("loop", "batch", "head", "query", "key")
    assert rec.stack(names[0]).shape == (3, 3, 2, 5, 5)
    for name in names[1:]:
        assert torch.equal(rec[f"{name}@0"], states())
    model.core.per_head = False
    with watch(model, names[0], schedule={"core": 3}, reduce=Mean("query")) as rec:
        model(x)
    assert rec.to_xarray(names[0]).dims == ("loop", "batch", "key")
    with watch(model, (), schedule={"core": 3}, fwd_hooks=[ablate("core.attn.hook_in.value@1", at=[0]),
                                                           ("core.attn.hook_in.0@2", lambda value, hook: value * 0)]):
        edited = model(x)
    by_hand = model.core(x)
    value = by_hand.clone()
    value[(slice(None), 0) if batch_first else 0] = 0
    by_hand = model.core.attn(by_hand, by_hand, value)[0]
    torch.testing.assert_close(edited, model.core.attn(by_hand * 0, by_hand, by_hand)[0])


# ------------------------------------------------------------------- carries and memories


class Pair(NamedTuple):
    z_H: Tensor
    z_L: Tensor


@dataclass
class Carry:
    z_H: Tensor
    z_L: Tensor


KINDS = {"tuple": (lambda high, low: (high, low), "0", "1"),
         "named tuple": (Pair, "z_H", "z_L"), "dataclass": (Carry, "z_H", "z_L"),
         "dict": (lambda high, low: {"z_H": high, "z_L": low}, "z_H", "z_L"),
         "nested": (lambda high, low: [{"inner": (high, low)}, None], "0.inner.0", "0.inner.1")}


class TwoStates(nn.Module):
    """Slow and fast state, handed on from loop to loop in one container."""

    def __init__(self, kind: str):
        super().__init__()
        self.make, self.high, self.low = KINDS[kind]

    def split(self, carry: Any) -> tuple[Tensor, Tensor]:
        return tuple(payload.get(carry, payload.element(carry, name)) for name in (self.high, self.low))

    def forward(self, carry: Any) -> Any:
        high, low = self.split(carry)
        low = torch.tanh(low + high)
        return self.make(high + low, low)


@pytest.mark.parametrize("kind", KINDS)
def test_both_states_of_a_carry_are_recorded_and_edited_each(kind: str) -> None:
    core, x = TwoStates(kind), states()
    model, high, low = Loop(core), f"core.hook_out.{core.high}", f"core.hook_out.{core.low}"
    carry, seen = core.make(x, 2 * x), []
    for _ in range(3):
        carry = core(carry)
        seen.append(core.split(carry))
    for schedule in ({"core": 3}, {"core": UpTo(7)}, None):
        with watch(model, [high, low, f"core.hook_in.0.{core.low}"], schedule=schedule) as rec:
            model(core.make(x, 2 * x))
        for k, (slow, fast) in enumerate(seen):
            assert torch.equal(rec[f"{high}@{k}"], slow)
            assert torch.equal(rec[f"{low}@{k}"], fast)
        assert torch.equal(rec[f"core.hook_in.0.{core.low}@2"], seen[1][1])
        assert rec.to_xarray(low).dims == ("loop", "batch", "pos", "d_model")
    with watch(model, low, schedule={"core": 3},
               fwd_hooks=[ablate(f"{low}@0"), patch(f"{high}@1", torch.ones_like(x))]) as edited:
        out = model(core.make(x, 2 * x))
    assert type(out) is type(carry)
    assert not edited[f"{low}@0"].any()
    last = core(core.make(torch.ones_like(x), edited[f"{low}@1"]))
    for one, other in zip(core.split(out), core.split(last), strict=True):
        assert torch.equal(one, other)
    assert not n_hooks(model)


def test_gradients_and_frozen_states_of_an_element() -> None:
    core, x = TwoStates("tuple"), states()
    model = Loop(core)
    given = (x.clone().requires_grad_(), x)
    with watch(model, "core.hook_out.1", schedule={"core": 3}, gradients=True,
               fwd_hooks=[freeze(0, "core.hook_out.1")]) as rec:
        model(given)[0].sum().backward()
    assert torch.equal(rec["core.hook_out.1@0"], rec["core.hook_out.1@2"])
    low = rec["core.hook_out.1@0"].requires_grad_()
    high = 0
    for _ in range(3):  # what each loop adds to the slow state is the fast one, which begins anew from the frozen one
        high = high + low if isinstance(high, int) else high + torch.tanh(low + x + high)
    expected, = torch.autograd.grad(high.sum(), low)
    torch.testing.assert_close(rec.gradients["core.hook_out.1@0"], expected)


class Recurrent(nn.Module):
    """An LSTM whose memory goes from loop to loop."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        memory = None
        for _ in range(3):
            x, memory = self.lstm(x) if memory is None else self.lstm(x, hx=memory)
        return x


@pytest.mark.parametrize("batch_first", [True, False])
def test_the_memory_of_an_lstm(batch_first: bool) -> None:
    torch.manual_seed(0)
    model, x = Recurrent(batch_first), states()
    x = x if batch_first else x.transpose(0, 1)
    with watch(model, ["lstm.hook_out", "lstm.hook_out.1.0", "lstm.hook_out.1.1"], schedule={"lstm": 3},
               batch_slice=slice(1, 3)) as rec:
        model(x)
    out, (h, c) = model.lstm(x)
    assert rec.to_xarray("lstm.hook_out.1.1").dims == ("loop", "batch", "layer", "d_model")
    assert torch.equal(rec["lstm.hook_out.1.0@0"], h.transpose(0, 1)[1:])
    assert torch.equal(rec["lstm.hook_out.1.1@0"], c.transpose(0, 1)[1:])
    assert torch.equal(rec["lstm.hook_out@0"], (out if batch_first else out.transpose(0, 1))[1:])
    with watch(model, "lstm.hook_out", schedule={"lstm": 3}, fwd_hooks=[
            ablate("lstm.hook_out.1.0@0"), ablate("lstm.hook_out.1.1@0")]) as forgetful:
        model(x)
    expected = model.lstm(out)[0]
    torch.testing.assert_close(forgetful["lstm.hook_out@1"], expected if batch_first else expected.transpose(0, 1))


# --------------------------------------------------------------------------- what is not there


def test_what_is_not_an_element_is_said() -> None:
    model, x = Loop(TwoStates("tuple")), states()
    for element, message in (("2", r"core\.hook_out\.2@0: TwoStates returned a tuple of Tensor, Tensor, in which \.2 "
                                   r"is no tensor; there are \.0, \.1"), ("0.1", r"in which \.0\.1 is no tensor"),
                             ("z_H", r"in which \.z_H is no tensor")):
        with pytest.raises(TypeError, match=message), watch(model, f"core.hook_out.{element}", schedule={"core": 3}):
            model((x, x))
    with (pytest.raises(TypeError, match=r"core\.hook_in\.mask@0: TwoStates was given .*, in which \.mask is no"),
          watch(model, "core.hook_in.mask", schedule={"core": 3})):
        model((x, x))
    with (pytest.raises(SiteError, match=r"which elements there are is known only when the module runs: spell"),
          watch(model, "core.hook_out.*", schedule={"core": 3})):
        pass
    with (pytest.raises(SiteError, match=r"No site is called 'cor\.hook_out\.1'"),
          watch(model, "cor.hook_out.1", schedule={})):
        pass
    with watch(model, "**", schedule={"core": 3}) as rec:
        model((x, x))
    assert set(rec) == {"hook_in", "hook_out", *(f"core.hook_{kind}@{k}" for kind in ("in", "out") for k in range(3))}
    assert not n_hooks(model)


def test_describe_names_the_elements(capsys: pytest.CaptureFixture[str]) -> None:
    describe(Recurrent(True), states())
    line = next(line for line in capsys.readouterr().out.splitlines() if "LSTM" in line)
    assert line.endswith("[3, 5, 8]  [3, 5, 8], .1.0 [2, 3, 8], .1.1 [2, 3, 8]")


@pytest.mark.parametrize(("value", "name", "where"), [
    ((1, torch.zeros(1)), "1", (1,)), ((1, torch.zeros(1)), "0", None),
    ({"a": {"b": torch.zeros(1)}}, "a.b", ("a", "b")),
    ({0: torch.zeros(1)}, "0", (0,)), ({"0": torch.zeros(1)}, "0", ("0",)), (torch.zeros(2), "0", None),
    (Pair(torch.zeros(1), torch.zeros(1)), "z_L", (1,)), (Pair(torch.zeros(1), torch.zeros(1)), "1", (1,)),
    ([torch.zeros(1)], "-1", None), (None, "0", None),
])
def test_where_an_element_is(value: Any, name: str, where: Any) -> None:
    assert payload.element(value, name) == where
