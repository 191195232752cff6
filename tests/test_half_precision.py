"""Models in float16 and bfloat16: finite and close to float32, and whole again when they are widened."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM
from hooks.bridges.hf import LoopMDMForMaskedLM
from hooks.model.diffusion import SamplerConfig, nelbo, sample
from hooks.model.loopmdm import MASK_LOGIT
from probes.lenses import LENSES, LensKind, read_lens
from tests.small import MASK, VARIANTS, small_model, small_tokens

HALVES = {torch.float16: 0.02, torch.bfloat16: 0.15}
"""Precision, and how far from float32 a value in nats may be."""

CASTS: dict[str, Callable[[HookedLoopMDM, torch.dtype], HookedLoopMDM]] = {
    "method": lambda model, dtype: model.half() if dtype == torch.float16 else model.bfloat16(),
    "to": lambda model, dtype: model.to(dtype),
    "to, with a device": lambda model, dtype: model.to("cpu", dtype),
    "copy": lambda model, dtype: copy.deepcopy(model.to(dtype)),
    "inside another module": lambda model, dtype: torch.nn.Sequential(model).to(dtype)[0],
}


def clean_tokens() -> Tensor:
    return small_tokens().masked_fill(small_tokens() == MASK, 2)


def rounded(model: HookedLoopMDM, dtype: torch.dtype) -> HookedLoopMDM:
    """A float32 model with weights as ``dtype`` rounds them, by hand."""
    made = HookedLoopMDM(model.config)
    made.load_state_dict({key: value.to(dtype).float() for key, value in model.state_dict().items()})
    return made.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", LENSES)
def test_lenses_are_finite_and_close(variant: str, dtype: torch.dtype, kind: LensKind) -> None:
    model, tokens = small_model(**VARIANTS[variant]), small_tokens()
    whole = read_lens(model, tokens, n_loops=3, kind=kind, targets=clean_tokens(), t=0.5, top_k=7)
    half = read_lens(copy.deepcopy(model).to(dtype), tokens, n_loops=3, kind=kind, targets=clean_tokens(), t=0.5,
                     top_k=7)
    for name in ("probability", "entropy", "kl_to_final", "nll", "target_probability", "top_probabilities"):
        assert bool(half[name].notnull().all()), name
        assert float(abs(half[name] - whole[name]).max()) < HALVES[dtype], name


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("cast", CASTS)
def test_the_bound_and_the_sampler_however_a_model_was_narrowed(cast: str, dtype: torch.dtype) -> None:
    model, tokens, t = small_model(), small_tokens(), torch.full((3,), 0.5)
    half = CASTS[cast](copy.deepcopy(model), dtype)
    with torch.no_grad():
        assert half(tokens, 3).dtype == dtype
        near, exact = (nelbo(m(tokens, 3), clean_tokens(), tokens, t, MASK) for m in (half, model))
    assert float(near) == pytest.approx(float(exact), abs=HALVES[dtype])
    for order in ("ancestral", "confidence"):
        for threshold in (None, 0.01):
            config = SamplerConfig(n_steps=3, order=order, exit_threshold=threshold)
            trace = sample(half, tokens, config, generator=torch.Generator().manual_seed(0))
            assert all(step.probability.isfinite().all() for step in trace)
            assert not (trace[-1].after == MASK).any()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("variant", ["plain", "both", "everything"])
def test_a_model_that_was_narrowed_and_widened_is_whole_but_for_its_weights(variant: str, dtype: torch.dtype) -> None:
    model, tokens = small_model(**VARIANTS[variant]), small_tokens()
    expected = rounded(model, dtype)
    narrow = copy.deepcopy(model).to(dtype)
    narrow(tokens, 3, t=0.5)
    for widened in (copy.deepcopy(narrow).float(), copy.deepcopy(narrow).to("cpu", torch.float32),
                    copy.deepcopy(narrow).double().float()):
        assert torch.equal(widened.mask_bias, expected.mask_bias)
        assert torch.equal(widened(tokens, 3, t=0.5), expected(tokens, 3, t=0.5))
        lens = read_lens(widened, tokens, n_loops=3, t=0.5)
        assert lens.equals(read_lens(expected, tokens, n_loops=3, t=0.5))


@pytest.mark.parametrize("dtype", HALVES)
def test_saving_and_loading_a_narrow_model(dtype: torch.dtype, tmp_path) -> None:
    model, tokens = small_model(), small_tokens()
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path)
    loaded = HookedLoopMDM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens, 3), rounded(model, dtype)(tokens, 3))
    for asked in (dtype, str(dtype).removeprefix("torch.")):
        wrapped = LoopMDMForMaskedLM.from_pretrained(tmp_path, dtype=asked)
        logits = wrapped(tokens).logits
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        assert torch.equal(wrapped.float().model(tokens, 3), loaded(tokens, 3))


def test_an_unknown_precision_is_refused(tmp_path) -> None:
    small_model().save_pretrained(tmp_path)
    for wrong in ("float17", "auto", "nn", 16):
        with pytest.raises(ValueError, match=f"dtype must be a floating-point torch.dtype or its name, not {wrong!r}"):
            LoopMDMForMaskedLM.from_pretrained(tmp_path, dtype=wrong)


@pytest.mark.parametrize("dtype", HALVES)
def test_every_site_is_finite_in_half_precision(dtype: torch.dtype) -> None:
    for changes in ({}, {"norm": "layer"}, {"qk_norm": False}):
        model = small_model(**changes)
        with torch.no_grad():
            model.embed.weight *= 300   # its squares are beyond float16
        _, rec = model.to(dtype).run_with_cache(small_tokens(), 2, names_filter="*")
        assert all(value.isfinite().all() for value in rec.values())
        assert model.forward_adaptive(small_tokens(), threshold=0.1).logits.isfinite().all()


def test_autocast_to_float16_keeps_the_lens_finite() -> None:
    model, tokens = small_model(), small_tokens()
    with torch.autocast("cpu", torch.float16):
        lens = read_lens(model, tokens, n_loops=2)
    assert all(bool(values.notnull().all()) for values in lens.values())


def test_the_masks_logit_is_exact_in_every_precision_and_its_probability_zero() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        logit = torch.tensor(MASK_LOGIT, dtype=dtype)
        assert float(logit) == MASK_LOGIT
        assert float(logit.double().exp()) == 0


def test_the_mask_is_not_drawn_at_any_temperature() -> None:
    tokens = torch.full((64, 9), MASK)
    trace = sample(small_model(), tokens, SamplerConfig(n_steps=1, temperature=1e8),
                   generator=torch.Generator().manual_seed(0))
    assert not (trace[-1].after == MASK).any()


def test_an_unrolled_bridge_is_narrowed_and_widened_with_its_model() -> None:
    model, tokens = small_model(), small_tokens()
    expected = rounded(model, torch.float16)
    bridge = model.unroll(3)
    bridge.half()
    assert bridge(tokens).isfinite().all()
    bridge.float()
    torch.testing.assert_close(bridge(tokens), expected(tokens, 3))


def test_a_model_first_run_in_inference_mode_can_be_trained() -> None:
    model = small_model()
    for dtype in (torch.float32, torch.float16, torch.float32):
        model.to(dtype)
        with torch.inference_mode():
            model(small_tokens(), 2)
    model(small_tokens(), 2)[..., 0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.blocks.parameters())
