"""The hidden state is found, recorded and edited inside whatever a module returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from hooks.foreign.watching import watch
from tests.small_looped import Wrapping, looped, states


@pytest.fixture
def model():
    return looped()


@pytest.fixture
def x():
    return states()


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
        self.inner = Wrapping(wrap)
        self.unwrap = unwrap

    def forward(self, x):
        self.returned = self.inner(hidden_states=x)
        return self.unwrap(self.returned)


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
