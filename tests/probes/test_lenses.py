"""Lenses: identities with the model's own output, and independent formulas for what they report."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr
from torch import Tensor

from hooks import HookedLoopMDM
from probes import read_lens
from probes.lenses import reading
from tests.small import MASK, VARIANTS, small_model, small_tokens

N_LOOPS = 3
LEVELS = torch.tensor([0.2, 0.5, 0.9])


def targets() -> Tensor:
    return torch.randint(0, MASK, (3, 9), generator=torch.Generator().manual_seed(1))


def distribution(model: HookedLoopMDM, n_loops: int, **options: Any) -> np.ndarray:
    """The model's own answer in double precision, by a forward that nothing observes."""
    with torch.no_grad():
        return model(small_tokens(), n_loops, **options).double().softmax(-1).numpy()


def gathered(p: np.ndarray) -> np.ndarray:
    return np.take_along_axis(p, targets().numpy()[..., None], -1)[..., 0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["logit", "coda"])
def test_the_last_entry_is_the_models_own_output_to_the_bit(kind: Any, variant: str) -> None:
    model, noised = small_model(**VARIANTS[variant]), small_tokens()
    with torch.no_grad():
        log_p = model(noised, N_LOOPS, t=LEVELS).log_softmax(-1)
    last = read_lens(model, noised, n_loops=N_LOOPS, kind=kind, targets=targets(), t=LEVELS).isel(depth=-1)
    np.testing.assert_array_equal(last.nll, -log_p.gather(-1, targets()[..., None])[..., 0])
    np.testing.assert_array_equal(last.prediction, log_p.argmax(-1))
    np.testing.assert_array_equal(last.kl_to_final, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_coda_lens_after_loop_k_is_the_model_with_k_plus_1_loops(variant: str) -> None:
    model = small_model(**VARIANTS[variant])
    lens = read_lens(model, small_tokens(), n_loops=N_LOOPS, kind="coda", targets=targets(), t=LEVELS)
    last_mid = model.config.n_head_layers + model.config.n_loop_layers - 1
    for k in range(N_LOOPS):
        here = lens.isel(depth=int(np.flatnonzero((lens.layer == last_mid) & (lens.loop == k))[0]))
        p = distribution(model, k + 1, t=LEVELS)
        np.testing.assert_allclose(here.target_probability, gathered(p), rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(here.probability, p.max(-1), rtol=2e-4)


@pytest.mark.parametrize("variant", ["plain", "deep", "all-looped", "everything"])
@pytest.mark.parametrize("kind", ["logit", "coda"])
def test_every_depth_agrees_with_layers_applied_by_hand(kind: Any, variant: str) -> None:
    model, noised = small_model(**VARIANTS[variant]), small_tokens()
    lens = read_lens(model, noised, n_loops=N_LOOPS, kind=kind, targets=targets())
    topology = model.config.topology(N_LOOPS)
    with torch.no_grad():
        condition = model.condition(noised)
        _, rec = model.run_with_cache(noised, N_LOOPS)
        rotary = model.rotary(9)
        for depth, (layer, _) in enumerate(topology.unrolled()):
            x = rec[topology.site_at(depth)]
            if kind == "coda":
                first = max(layer + 1, topology.n_head + topology.n_mid)
                for block in list(model.blocks)[first:]:
                    x = block(x, rotary, condition)
            p = model.unembed(x, condition).double().softmax(-1).numpy()
            here = lens.isel(depth=depth)
            np.testing.assert_allclose(here.nll, -np.log(gathered(p)), atol=2e-5)
            np.testing.assert_allclose(here.entropy, -(p * np.log(p, where=p > 0, out=np.zeros_like(p))).sum(-1),
                                       atol=2e-5)
            final = distribution(model, N_LOOPS)
            np.testing.assert_allclose(here.kl_to_final, rel_entr(final, p).sum(-1), atol=2e-5)


def test_top_k_lists_the_tokens_by_falling_probability() -> None:
    model = small_model()
    lens = read_lens(model, small_tokens(), n_loops=N_LOOPS, top_k=4)
    assert dict(lens.top_tokens.sizes) == {"depth": 8, "batch": 3, "pos": 9, "rank": 4}
    np.testing.assert_array_equal(lens.top_tokens.isel(rank=0), lens.prediction)
    order = np.argsort(-distribution(model, N_LOOPS), -1)[..., :4]
    np.testing.assert_array_equal(lens.top_tokens.isel(depth=-1), order)
    assert (lens.top_probabilities.diff("rank") <= 0).all()
    every = read_lens(model, small_tokens(), n_loops=N_LOOPS, top_k=model.config.vocab_size)
    np.testing.assert_allclose(every.top_probabilities.sum("rank"), 1, rtol=1e-5)
    assert "top_tokens" not in read_lens(model, small_tokens(), n_loops=N_LOOPS)


def test_another_answer_can_stand_for_the_final_one() -> None:
    model, noised = small_model(), small_tokens()
    with torch.no_grad():
        one_loop = model(noised, 1)
    lens = read_lens(model, noised, n_loops=N_LOOPS, kind="coda", final=one_loop)
    np.testing.assert_allclose(lens.kl_to_final.isel(depth=2), 0, atol=1e-6)   # layer 2 of loop 0: one loop
    assert float(lens.kl_to_final.isel(depth=-1).max()) > 1e-3


@pytest.mark.parametrize("kind", ["logit", "coda"])
def test_working_in_small_chunks_changes_nothing(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(**VARIANTS["everything"])
    whole = read_lens(model, small_tokens(), n_loops=N_LOOPS, kind=kind, targets=targets(), t=LEVELS)
    monkeypatch.setattr(reading, "CHUNK_ELEMENTS", 1)
    in_rows = read_lens(model, small_tokens(), n_loops=N_LOOPS, kind=kind, targets=targets(), t=LEVELS)
    for name in ("nll", "entropy", "kl_to_final"):
        np.testing.assert_allclose(in_rows[name], whole[name], atol=1e-5)


def test_results_carry_axes_roles_units_and_source_and_the_model_is_left_clean() -> None:
    model, noised = small_model(), small_tokens()
    lens = read_lens(model, noised, n_loops=N_LOOPS, kind="coda", targets=targets())
    assert lens.layer.values.tolist() == [0, 1, 2, 1, 2, 1, 2, 3]
    assert lens.loop.values.tolist() == [-1, 0, 0, 1, 1, 2, 2, -1]
    np.testing.assert_array_equal(lens.scored, noised == MASK)
    assert lens.nll.attrs["units"] == "nat"
    assert lens.probability.attrs["units"] == "probability"
    assert all("2507.02199" in v.attrs["source"] and v.attrs["definition"] for v in lens.data_vars.values())
    assert not any(point.entries for point in model.hook_points.values())


@pytest.mark.parametrize(("options", "message"), [
    ({"kind": "tuned"}, "kind must be one of logit, coda, or a fitted lens, not 'tuned'"),
    ({"top_k": 8}, "top_k must be between 1 and the vocabulary's 7, not 8"),
    ({"targets": torch.full((3, 9), MASK)}, r"targets must be clean tokens: ids in 0..6 other than the mask \(6\)"),
    ({"targets": torch.full((3, 9), -1)}, "targets must be clean tokens"),
    ({"targets": torch.zeros(3, 8, dtype=torch.long)},
     r"targets have shape \(3, 8\), the answer is \[batch, pos\] = \(3, 9\)"),
    ({"final": torch.zeros(3, 9, 5)}, r"final must hold logits \[batch, pos, vocab\] = \(3, 9, 7\)"),
])
@pytest.mark.unchecked
def test_what_cannot_be_read_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_lens(small_model(), small_tokens(), n_loops=2, **options)
