"""Padding: sequences of different lengths share a batch, and each gets what it gets alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM
from hooks.edits import ablate, edit, freeze, skip_loop, swap_layers
from hooks.model.diffusion import SamplerConfig, corrupt, corrupt_exactly, nelbo, sample
from hooks.model.sampling import record_sampling
from probes.attention import attention_summary, pattern_distance, patterns
from probes.lenses import read_lens
from tests.small import MASK, VARIANTS, small_model, small_tokens

pytestmark = pytest.mark.usefixtures("no_gradients")

LENGTHS = (9, 5, 7, 2)

variants = pytest.mark.parametrize("variant", list(VARIANTS))
sides = pytest.mark.parametrize("side", ["right", "left"])


def padded(side: str = "right", pad: int = MASK) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Tokens [batch, pos] padded with ``pad``, their mask, and each sequence alone [1, pos]."""
    tokens, mask = small_tokens(batch=4, seed=5), torch.zeros(4, 9, dtype=torch.long)
    for i, n in enumerate(LENGTHS):
        mask[i, :n] = 1
    if side == "left":
        mask = mask.flip(1)
    alone = [tokens[i:i + 1][:, mask[i].bool()] for i in range(4)]
    return tokens.masked_fill(mask == 0, pad), mask, alone


def each(values: Tensor, mask: Tensor) -> list[Tensor]:
    return [values[i:i + 1][:, mask[i].bool()] for i in range(len(mask))]


@variants
@sides
def test_real_positions_get_what_the_sequence_gets_alone(variant: str, side: str) -> None:
    model = small_model(**VARIANTS[variant]).double()   # so that what remains is not the rounding of other kernels
    for pad in (MASK, 0):
        tokens, mask, alone = padded(side, pad)
        for logits, one in zip(each(model(tokens, 3, attention_mask=mask), mask), alone, strict=True):
            torch.testing.assert_close(logits, model(one, 3), atol=1e-6, rtol=0)


@variants
def test_in_single_precision_too(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    tokens, mask, alone = padded()
    for logits, one in zip(each(model(tokens, 3, attention_mask=mask), mask), alone, strict=True):
        torch.testing.assert_close(logits, model(one, 3), atol=1e-5, rtol=1e-5)


@variants
@sides
def test_materialised_patterns_leave_padding_out(variant: str, side: str) -> None:
    model = small_model(**VARIANTS[variant]).double()
    tokens, mask, alone = padded(side)
    names = ["**.attn.hook_pattern", "**.attn.hook_attn_scores", "**.hook_resid_post"]
    logits, rec = model.run_with_cache(tokens, 3, names_filter=names, attention_mask=mask)
    assert torch.allclose(logits, model(tokens, 3, attention_mask=mask), atol=1e-9)
    for i, one in enumerate(alone):
        _, own = model.run_with_cache(one, 3, names_filter=names)
        real = mask[i].bool()
        for site in own:
            if site.partition("@")[0].endswith("hook_resid_post"):
                torch.testing.assert_close(rec[site][i:i + 1, real], own[site], atol=1e-6, rtol=1e-6)
            else:
                torch.testing.assert_close(rec[site][i:i + 1, :, real][..., real], own[site], atol=1e-6, rtol=0)
                never = 0 if "pattern" in site else -torch.inf
                assert (rec[site][i][..., ~real] == never).all()


def test_edited_scores_attend_to_no_padding() -> None:
    model = small_model()
    tokens, mask, _ = padded()
    with edit(model, [ablate("**.attn.hook_attn_scores")], n_loops=2):
        _, rec = model.run_with_cache(tokens, 2, names_filter="**.attn.hook_pattern", attention_mask=mask)
    expected = (mask / mask.sum(1, keepdim=True))[:, None, None]
    for site in rec:
        torch.testing.assert_close(rec[site], expected.expand_as(rec[site]))


@pytest.mark.parametrize("edits", [[skip_loop(1)], [swap_layers(1, 2, 1)], [skip_loop(1, at=[0, 1])], [freeze(0)]])
def test_edits_of_padded_runs(edits: list[Any]) -> None:
    model = small_model().double()
    tokens, mask, alone = padded()
    logits = model.run_with_hooks(tokens, 3, fwd_hooks=edits, attention_mask=mask)
    for ours, one in zip(each(logits, mask), alone, strict=True):
        torch.testing.assert_close(ours, model.run_with_hooks(one, 3, fwd_hooks=edits), atol=1e-6, rtol=0)


@variants
def test_adaptive_looping_does_not_wait_for_padding(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).double()
    tokens, mask, alone = padded()
    for threshold in (0.02, 0.1, 0.5):
        logits, used = model.forward_adaptive(tokens, threshold=threshold, max_loops=12, attention_mask=mask)
        for i, one in enumerate(alone):
            own, loops = model.forward_adaptive(one, threshold=threshold, max_loops=12)
            assert used[i] == loops[0]
            torch.testing.assert_close(logits[i:i + 1][:, mask[i].bool()], own, atol=1e-6, rtol=0)


def test_unpadded_runs_are_the_same_bit_for_bit() -> None:
    model, tokens = small_model(), small_tokens()
    for mask in (torch.ones(3, 9), torch.ones(3, 9, dtype=torch.long), torch.ones(3, 9, dtype=torch.bool)):
        assert torch.equal(model(tokens, 3, attention_mask=mask), model(tokens, 3))
        assert model.enter(tokens, 3, attention_mask=mask)[1].real is None


@variants
def test_running_by_hand_carries_the_padding(variant: str) -> None:
    model = small_model(**VARIANTS[variant]).double()
    tokens, mask, alone = padded()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    state, context = model.enter(inputs, 3)
    assert torch.equal(model.enter(tokens, 3, attention_mask=mask)[0], state)
    assert torch.allclose(model.resume(0, state, context), model(inputs, 3), atol=1e-9)
    order = torch.tensor([3, 1, 1])
    some = model.resume(0, state[order], context.rows(order))
    for ours, i in zip(some, order.tolist(), strict=True):
        torch.testing.assert_close(ours[mask[i].bool()], model(alone[i], 3)[0], atol=1e-6, rtol=0)
    selected = model.select(inputs, order)
    torch.testing.assert_close(model(selected, 3), some)


def test_padding_is_never_scored_nor_recorded_as_masked_or_visible() -> None:
    model = small_model()
    tokens, mask, alone = padded()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    assert torch.equal(model.scored(inputs), (tokens == MASK) & (mask == 1))
    site = "blocks.2.hook_resid_post@1"
    for only in ("masked", "visible"):
        _, rec = model.run_with_cache(inputs, 2, names_filter=site, only=only)  # type: ignore[arg-type]
        _, same = model.run_with_cache(tokens, 2, names_filter=site, only=only,  # type: ignore[arg-type]
                                       attention_mask=mask)
        own = [model.run_with_cache(one, 2, names_filter=site, only=only)[1][site]  # type: ignore[arg-type]
               for one in alone]
        torch.testing.assert_close(rec[site], torch.cat(own), atol=1e-5, rtol=1e-4)
        assert torch.equal(rec[site], same[site])


def test_probes_take_padded_inputs() -> None:
    model = small_model(**VARIANTS["everything"]).double()
    tokens, mask, alone = padded()
    inputs = {"input_ids": tokens, "attention_mask": mask}
    for kind in ("logit", "coda"):
        lens = read_lens(model, inputs, n_loops=2, kind=kind)  # type: ignore[arg-type]
        assert (lens.scored.values == ((tokens == MASK) & (mask == 1)).numpy()).all()
        for i, one in enumerate(alone):
            own = read_lens(model, one, n_loops=2, kind=kind)  # type: ignore[arg-type]
            ours = lens.entropy.values[:, i][:, mask[i].bool().numpy()]
            assert abs(ours - own.entropy.values[:, 0]).max() < 1e-5
    assert abs(patterns(model, inputs, n_loops=2).values[:, 1, :, :, 5:]).max() == 0
    summary = attention_summary(model, inputs, n_loops=2, per_example=True)
    distance = pattern_distance(model, inputs, n_loops=2)
    for i, one in enumerate(alone):
        own = attention_summary(model, one, n_loops=2, per_example=True)
        for name, values in own.items():
            np.testing.assert_allclose(summary[name].values[:, i], values.values[:, 0], atol=1e-5)
        apart = pattern_distance(model, one, n_loops=2)
        for name in ("frobenius_by_example", "jensen_shannon_by_example"):
            np.testing.assert_allclose(distance[name].values[i], apart[name].values[0], atol=1e-5)


# ----------------------------------------------------------------- diffusion


@pytest.mark.parametrize("pad", [MASK, 0])
@pytest.mark.parametrize("order", ["confidence", "ancestral"])
def test_sampling_never_reveals_padding(order: Any, pad: int) -> None:
    model = small_model(**VARIANTS["time-t"])
    tokens, mask, _ = padded(pad=pad)
    trace = sample(model, tokens, SamplerConfig(n_steps=3, n_loops=2, order=order), attention_mask=mask,
                   generator=torch.Generator().manual_seed(0))
    for step in trace:
        assert torch.equal(step.after[mask == 0], tokens[mask == 0])
        assert not step.revealed[mask == 0].any()
    assert (trace[-1].after[mask == 1] != MASK).all()


def test_samples_of_a_padded_batch_are_those_of_each_sequence() -> None:
    model = small_model(**VARIANTS["time-t"])
    tokens, mask, alone = padded()
    for config in (SamplerConfig(n_steps=3, n_loops=3, order="confidence", temperature=0),
                   SamplerConfig(n_steps=3, n_loops=9, order="confidence", temperature=0, exit_threshold=0.2)):
        trace = sample(model, {"input_ids": tokens, "attention_mask": mask}, config)
        for i, one in enumerate(alone):
            own = sample(model, one, config)
            for ours, theirs in zip(trace, own, strict=True):
                assert torch.equal(ours.after[i, mask[i].bool()], theirs.after[0])
                assert ours.loops_used[i] == theirs.loops_used[0]


def test_recorded_sampling_leaves_padding_out() -> None:
    model = small_model()
    tokens, mask, _ = padded()
    seen: list[int] = []
    trace = record_sampling(model, tokens, SamplerConfig(n_steps=3, n_loops=2, order="confidence"),
                            lambda step, rec: seen.append(len(rec["blocks.1.hook_resid_post@1"])),
                            names_filter="blocks.1.hook_resid_post", only="masked", attention_mask=mask)
    assert seen == [int(((step.before == MASK) & (mask == 1)).sum()) for step in trace]


def test_positions_of_recorded_sampling_may_be_a_list() -> None:
    shapes: list[tuple[int, ...]] = []
    record_sampling(small_model(), padded()[0], SamplerConfig(n_steps=3, n_loops=2),
                    lambda step, rec: shapes.append(tuple(rec["blocks.1.hook_resid_post@1"].shape)),
                    names_filter="blocks.1.hook_resid_post", pos_slice=[0, 8])
    assert shapes == [(4, 2, 16)] * 3


def test_padding_is_never_corrupted_and_carries_no_loss() -> None:
    _, mask, _ = padded()
    clean = small_tokens(batch=4, seed=7).clamp(max=MASK - 1)
    free = torch.ones_like(clean, dtype=torch.bool)
    free[:, 0] = False
    t = torch.tensor([1.0, 0.5, 0.7, 0.9])
    noised = corrupt(clean, t, MASK, attention_mask=mask, generator=torch.Generator().manual_seed(1))
    assert torch.equal(noised[mask == 0], clean[mask == 0])
    exactly = corrupt_exactly(clean, torch.ones(4), MASK, free=free, attention_mask=mask)
    assert torch.equal(exactly == MASK, free & (mask == 1))
    noised = noised.masked_fill(mask == 0, MASK)  # padding may be written as the mask
    logits = torch.randn(4, 9, 7, generator=torch.Generator().manual_seed(2))
    for given in (None, free):
        total, count = 0.0, 0
        for i in range(4):
            for j in range(LENGTHS[i]):
                counted = given is None or bool(given[i, j])
                count += counted
                if noised[i, j] == MASK:
                    total -= float(logits[i, j].log_softmax(-1)[clean[i, j]]) / float(t[i])
        ours = nelbo(logits, clean, noised, t, MASK, free=given, attention_mask=mask)
        assert float(ours) == pytest.approx(total / count, rel=1e-5)
    with pytest.raises(ValueError, match="no position of this batch is free"):
        nelbo(logits, clean, noised, t, MASK, free=~free & (mask == 0))


# -------------------------------------------------------------------- errors


def entry_points(model: HookedLoopMDM, tokens: Any, **given: Any) -> dict[str, Any]:
    """Everything that takes tokens."""
    config = SamplerConfig(n_steps=1, n_loops=2)
    return {
        "forward": lambda: model(tokens, 2, **given),
        "adaptive": lambda: model.forward_adaptive(tokens, threshold=0.1, **given),
        "cache": lambda: model.run_with_cache(tokens, 2, **given),
        "only": lambda: model.run_with_cache(tokens, 2, only="masked", **given),
        "hooks": lambda: model.run_with_hooks(tokens, 2, **given),
        "enter": lambda: model.enter(tokens, 2, **given),
        "sample": lambda: sample(model, tokens, config, **given),
        "record": lambda: record_sampling(model, tokens, config, lambda step, rec: None, names_filter=None, **given),
    }


ENTRIES = list(entry_points(small_model(), small_tokens()))


@pytest.mark.unchecked
@pytest.mark.parametrize("entry", [*ENTRIES, "scored", "targets", "corrupt", "nelbo", "lens", "unrolled"])
@pytest.mark.parametrize("make", [lambda t: t.tolist(), lambda t: t.numpy(), lambda t: tuple(t), lambda t: None])
def test_lists_and_arrays_are_refused_alike_everywhere(entry: str, make: Any) -> None:
    model, tokens = small_model(), make(small_tokens())
    run = {**entry_points(model, tokens), "scored": lambda: model.scored(tokens),
           "targets": lambda: model.targets(tokens), "corrupt": lambda: corrupt(tokens, 0.5, MASK),
           "lens": lambda: read_lens(model, tokens, n_loops=2),
           "nelbo": lambda: nelbo(torch.zeros(3, 9, 7), tokens, tokens, torch.ones(3), MASK),
           "unrolled": lambda: model.unroll(2).original_model(tokens) if tokens is not None else model(tokens)}[entry]
    with pytest.raises(TypeError, match=r"tokens must be a tensor \[batch, pos\], not a \w+: torch\.as_tensor\("):
        run()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("shape", [(0, 9), (3, 0), (0, 0)])
def test_an_empty_batch_is_refused(entry: str, shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"tokens of shape \[\d, \d\] hold nothing to run on: give at least one"):
        entry_points(small_model(), torch.zeros(shape, dtype=torch.long))[entry]()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(("mask", "kind", "message"), [
    (torch.ones(3, 8), ValueError, r"attention_mask must be \[batch, pos\] like the tokens, \[3, 9\], not \[3, 8\]"),
    (torch.ones(9), ValueError, r"must be \[batch, pos\] like the tokens"),
    (torch.zeros(3, 1, 9, 9), ValueError, r"must be \[batch, pos\] like the tokens"),
    (torch.full((3, 9), -1e9), ValueError, r"must hold 1 \(real\) and 0 \(padding\) alone; an additive mask is made"),
    (torch.ones(3, 9).index_fill(0, torch.tensor([1]), 0), ValueError, r"example 1 is padding alone: leave it out"),
    (torch.ones(3, 9).index_fill(1, torch.tensor([4]), 0), ValueError, r"example 0 has padding in its middle: pad"),
    ([[1] * 9] * 3, TypeError, r"attention_mask must be a tensor \[batch, pos\], not a list"),
])
@pytest.mark.unchecked
def test_masks_that_mean_nothing_are_refused(entry: str, mask: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        entry_points(small_model(), small_tokens(), attention_mask=mask)[entry]()


def test_mappings_of_other_things_are_refused() -> None:
    model, tokens = small_model(), small_tokens()
    ones = torch.ones_like(tokens)
    for inputs in ({"tokens": tokens}, {"input_ids": tokens, "token_type_ids": tokens}, {}):
        with pytest.raises(ValueError, match=r"a mapping of input_ids and, with padding, attention_mask, not of"):
            model(inputs, 2)
    with pytest.raises(ValueError, match=r"attention_mask was given twice"):
        model({"input_ids": tokens, "attention_mask": ones}, 2, attention_mask=ones)
    assert torch.equal(model({"input_ids": tokens}, 2), model(tokens, 2))


def test_the_unrolled_network_refuses_padding() -> None:
    tokens, mask, _ = padded()
    with pytest.raises(ValueError, match=r"run the looped model, which takes padding"):
        small_model().unroll(2).original_model(tokens, attention_mask=mask)
