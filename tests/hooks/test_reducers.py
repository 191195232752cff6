"""Reducers: each equals what the full recording gives afterwards, is labelled, and keeps memory flat."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM
from hooks.recording import Recorder, Shelf
from hooks.reducers import ChangeFromPrevious, CosineToPrevious, Entropy, Histogram, Mean, Norm, Reduced, Reduction
from tests.small import MASK, small_tokens

pytestmark = pytest.mark.usefixtures("no_gradients")

POST = "blocks.2.hook_resid_post"
PATTERN = "blocks.1.attn.hook_pattern"
N = 5


def full(model: HookedLoopMDM, tokens: Tensor, name: str) -> Tensor:
    return model.run_with_cache(tokens, N, names_filter=name)[1].stack(name)


@pytest.mark.parametrize(("name", "reducer", "afterwards", "dims"), [
    (POST, Mean("pos"), lambda x: x.mean(2), "loop batch d_model"),
    (POST, Mean("batch"), lambda x: x.mean(1), "loop pos d_model"),
    (POST, Mean("pos", where=small_tokens() == MASK),
     lambda x: torch.stack([x[:, i, row].mean(1) for i, row in enumerate(small_tokens() == MASK)], 1),
     "loop batch d_model"),
    (POST, Norm(), lambda x: x.square().sum(-1).sqrt(), "loop batch pos"),
    (PATTERN, Entropy(), lambda x: -(x * x.log()).sum(-1), "loop batch head query"),
    (PATTERN, Mean("head"), lambda x: x.mean(2), "loop batch query key"),
    (POST, Histogram(-2, 2, 8), lambda x: torch.stack([torch.histc(v.clamp(-2, 2), 8, -2, 2) for v in x]).long(),
     "loop bin"),
    (POST, Reduced(lambda x, site: x.amax((1, 2)), dims=("batch",)), lambda x: x.amax((2, 3)), "loop batch"),
    (POST, lambda x, site: x[..., :3], lambda x: x[..., :3], "loop axis_0 axis_1 axis_2"),
])
def test_a_reduction_is_that_of_the_full_recording(name: str, reducer: Any, afterwards: Any, dims: str,
                                                   model: HookedLoopMDM, tokens: Tensor) -> None:
    logits, rec = model.run_with_cache(tokens, N, names_filter=name, reduce=reducer)
    torch.testing.assert_close(rec.stack(name), afterwards(full(model, tokens, name)))
    array = rec.to_xarray(name)
    assert array.dims == tuple(dims.split())
    if isinstance(reducer, Reduction):
        assert array.attrs["definition"] == reducer.definition
        assert array.attrs["units"] == reducer.units
    torch.testing.assert_close(logits, model(tokens, N), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("reducer", "formula"), [
    (CosineToPrevious(), lambda now, before: (now * before).sum(-1) / now.norm(dim=-1) / before.norm(dim=-1)),
    (ChangeFromPrevious(), lambda now, before: (now - before).norm(dim=-1) / before.norm(dim=-1)),
])
def test_comparisons_with_the_loop_before(reducer: Reduction, formula: Any, model: HookedLoopMDM,
                                          tokens: Tensor) -> None:
    state = full(model, tokens, POST)
    for _ in range(2):  # a second run starts afresh
        _, rec = model.run_with_cache(tokens, N, names_filter=POST, reduce=reducer)
        held = rec.stack(POST)
        assert held[0].isnan().all()
        torch.testing.assert_close(held[1:], formula(state[1:], state[:-1]))
    _, rec = model.run_with_cache(tokens, N, names_filter=[f"{POST}@0", f"{POST}@2:4"], reduce=reducer)
    assert rec[f"{POST}@2"].isnan().all()  # loop 1 was not recorded, and loop 0 is not what precedes loop 2
    torch.testing.assert_close(rec[f"{POST}@3"], formula(state[3], state[2]))
    assert rec.axes[POST] == ("batch", "pos")


def test_nested_cycles_follow_each_other() -> None:
    reducer, values = CosineToPrevious(), torch.randn(6, 2, 3, 4)
    sites = [f"L.0.hook_out@h{h}.l{i}" for h in range(2) for i in range(3)]
    out = [reducer(value, site) for value, site in zip(values, sites, strict=True)]
    assert out[0].isnan().all()
    for now, before, cosine in zip(values[1:], values[:-1], out[1:], strict=True):
        torch.testing.assert_close(cosine, torch.cosine_similarity(now, before, dim=-1))


@pytest.mark.parametrize("only", ["masked", "visible"])
def test_only_masked_or_only_visible_positions(only: Any, model: HookedLoopMDM, tokens: Tensor) -> None:
    chosen = (tokens == MASK) == (only == "masked")
    names = [POST, PATTERN, "blocks.1.attn.hook_q"]
    _, whole = model.run_with_cache(tokens, N, names_filter=names)
    _, rec = model.run_with_cache(tokens, N, names_filter=names, only=only)
    for site in whole:
        value = whole[site].transpose(1, 2) if "pattern" in site else whole[site]
        assert torch.equal(rec[site], value[chosen])
        assert len(rec[site]) == int(chosen.sum())
    assert rec.to_xarray(POST).dims == ("loop", "point", "d_model")
    assert rec.to_xarray(PATTERN).dims == ("loop", "point", "head", "key")
    _, norms = model.run_with_cache(tokens, N, names_filter=POST, only=only, reduce=Norm())
    assert norms.to_xarray(POST).dims == ("loop", "point")
    torch.testing.assert_close(norms[f"{POST}@1"], rec[f"{POST}@1"].norm(dim=-1))


def test_batch_and_position_slices_cut_every_axis_they_name(model: HookedLoopMDM, tokens: Tensor) -> None:
    names = [POST, PATTERN, "blocks.1.attn.hook_q", "hook_embed"]
    _, whole = model.run_with_cache(tokens, N, names_filter=names)
    mask = tokens == MASK
    for batch in (slice(1, 3), torch.tensor([2, 0])):
        _, rec = model.run_with_cache(tokens, N, names_filter=names, batch_slice=batch, pos_slice=slice(2, 6))
        for site in whole:
            cut = whole[site][batch]
            assert torch.equal(rec[site], cut[:, :, 2:6] if "pattern" in site else cut[:, 2:6])
        _, points = model.run_with_cache(tokens, N, names_filter=POST, batch_slice=batch, only="masked")
        torch.testing.assert_close(points[f"{POST}@1"], whole[f"{POST}@1"][batch][mask[batch]])


def test_dtype_and_device_are_those_of_the_reduction(model: HookedLoopMDM, tokens: Tensor) -> None:
    _, rec = model.run_with_cache(tokens, N, names_filter=POST, reduce=Norm(), dtype=torch.float64, device="cpu")
    assert rec[f"{POST}@0"].dtype == torch.float64
    torch.testing.assert_close(rec.stack(POST), full(model, tokens, POST).norm(dim=-1).double())


def test_gradients_at_loop_sites_are_reduced_too(model: HookedLoopMDM, tokens: Tensor) -> None:
    def loss(logits: Tensor) -> Tensor:
        return logits[..., 2].sum()

    _, whole = model.run_with_cache(tokens, N, names_filter=POST, loss_fn=loss)
    _, rec = model.run_with_cache(tokens, N, names_filter=POST, loss_fn=loss, reduce=Norm())
    assert rec.gradients is not None
    assert whole.gradients is not None
    torch.testing.assert_close(rec.gradients.stack(POST), whole.gradients.stack(POST).norm(dim=-1))
    assert rec.gradients.to_xarray(POST).dims == ("loop", "batch", "pos")
    with pytest.raises(ValueError, match="CosineToPrevious compares a loop with the one before it, and a backward"):
        model.run_with_cache(tokens, N, names_filter=POST, loss_fn=loss, reduce=CosineToPrevious())


def live_bytes() -> int:
    """Bytes in all tensors that are alive, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects()
                if type(t) in (Tensor, torch.nn.Parameter)}
    return sum(storages.values())


@pytest.mark.parametrize("reducer", [Mean("pos"), CosineToPrevious(), Histogram(-1, 1, 4)])
def test_what_is_held_does_not_grow_with_loops(reducer: Reduction, model: HookedLoopMDM) -> None:
    tokens = small_tokens(batch=64)
    one_activation = 64 * 9 * 16 * 4

    def most(n_loops: int, **options: Any) -> int:
        seen = []
        last = ("hook_loop_in", lambda x, hook: seen.append(live_bytes()))
        with model.hooks([last], n_loops=n_loops):
            model.run_with_cache(tokens, n_loops, names_filter=POST, **options)
        return max(seen)

    few, many = most(2, reduce=reducer), most(16, reduce=reducer)
    largest_result = 64 * 16 * 4
    assert many - few <= one_activation + 14 * largest_result
    assert most(16) - most(2) >= 13 * one_activation  # or the measure sees nothing


def test_a_reducer_forgets_what_it_held_after_the_run(model: HookedLoopMDM, tokens: Tensor) -> None:
    reducer = CosineToPrevious()
    model.run_with_cache(tokens, N, names_filter=POST, reduce=reducer)
    assert not reducer._previous


@pytest.mark.parametrize(("name", "reducer", "message"), [
    (PATTERN, Norm(), r"Norm\('d_model'\) has nothing to reduce at .*hook_pattern@0, whose axes are batch, head"),
    (POST, Entropy(), r"Entropy reads distributions, and .* holds none: name '\*\*.attn.hook_pattern'"),
    ("blocks.0.hook_resid_post", CosineToPrevious(), r"compares loops, and .* runs once: name looped sites only"),
    (POST, Reduced(lambda x, site: x, dims=("batch",)), r"returned shape \(3, 9, 16\) at .*, and was said to"),
    (POST, lambda x, site: 1.0, "the reducer returned float at .*; it must return a tensor"),
])
def test_reducers_that_do_not_fit_their_site_say_so(name: str, reducer: Any, message: str, model: HookedLoopMDM,
                                                    tokens: Tensor) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        model.run_with_cache(tokens, N, names_filter=name, reduce=reducer)


@pytest.mark.unchecked
def test_options_are_checked(model: HookedLoopMDM, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="where chooses positions"):
        Mean("head", where=tokens == MASK)
    with pytest.raises(ValueError, match="a histogram needs low < high"):
        Histogram(1, 1)
    with pytest.raises(ValueError, match="only must be 'masked' or 'visible', not 'all'"):
        model.run_with_cache(tokens, only="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pos_slice and only both choose positions"):
        model.run_with_cache(tokens, only="masked", pos_slice=slice(2))
    with pytest.raises(ValueError, match=r"must be boolean and \[batch, pos\], here \[3, 9\], not torch.bool \[9, 3\]"):
        model.run_with_cache(tokens, pos_slice=torch.ones(9, 3, dtype=torch.bool))


def test_a_recorder_is_empty_after_its_recording_was_taken(model: HookedLoopMDM, tokens: Tensor) -> None:
    recorder = Recorder(reduce=Norm())
    model.run_with_hooks(tokens, 2, fwd_hooks=[(POST, recorder)])
    names = {POST: (("", 2),)}
    assert len(recorder.recording(names)) == 2
    assert len(recorder.recording(names)) == 0


def test_small_results_share_a_block_during_the_run_and_none_after_it(model: HookedLoopMDM, tokens: Tensor) -> None:
    recorder = Recorder(reduce=Norm())
    model.run_with_hooks(tokens, N, fwd_hooks=[(POST, recorder)])
    assert len({value.untyped_storage().data_ptr() for value in recorder.held.values()}) == 1
    values = dict(recorder.held)
    rec = recorder.recording({POST: (("", N),)})
    assert len({value.untyped_storage().data_ptr() for value in rec.values()}) == N
    assert all(torch.equal(rec[site], values[site]) for site in rec)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in rec.values())
    shelf, large = Shelf(), torch.randn(Shelf.BLOCK // 4)
    pieces = [torch.full((i % 7 + 1, 1000), float(i)) for i in range(200)]  # more than one block of them
    kept = [shelf.put(piece) for piece in [*pieces, large, large.double()[:3], large[:0]]]
    for one, other in zip(kept, [*pieces, large, large.double()[:3], large[:0]], strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    assert 1 < len({piece.untyped_storage().data_ptr() for piece in kept[:200]}) < 10
