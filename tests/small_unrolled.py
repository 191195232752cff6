"""Looped models beside their unrolled bridges, that the tests of both share."""

from __future__ import annotations

import functools

import torch

from tests.small import MASK, VARIANTS, small_model, small_tokens

LOOPS = 3
# Where adaLN differs by example, no single W_U reads the model out: these are unrolled at one t below.
BY_EXAMPLE = {"time-t", "time-sigma", "everything"}


def fresh(name: str):
    """The looped model, its bridge (at one noise level where there are several), tokens and the looped logits."""
    model = small_model(**VARIANTS[name])
    t = 0.4 if name in BY_EXAMPLE else None
    tokens = small_tokens()
    with torch.no_grad():
        return model, model.unroll(LOOPS, t=t), tokens, model(tokens, LOOPS, t=t)


build = functools.cache(fresh)  # for tests that leave weights and flags as they are


def close(a, b, atol=2e-5):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=atol)


def visible(logits):
    """Without the mask token, whose −10⁶ would hide differences under the relative tolerance."""
    return torch.cat([logits[..., :MASK], logits[..., MASK + 1:]], -1)
