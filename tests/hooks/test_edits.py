"""Edits at sites: identities that each must satisfy, effects computed by hand, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM, SiteError
from hooks.edits import (
    Edit,
    ablate,
    copy,
    edit,
    freeze,
    patch,
    repeat_loop,
    skip_layer,
    skip_loop,
    steer,
    swap_layers,
    swap_loops,
)
from tests.small import small_model, small_tokens
from tests.small_edits import POST, N, run

pytestmark = pytest.mark.usefixtures("no_gradients")


# ------------------------------------------------------------------- edits that change nothing


@pytest.mark.parametrize("make", [
    lambda model, rec: patch("**.hook_resid_post", rec),
    lambda model, rec: patch("**.hook_mlp_out@*", rec, at=[1, 4]),
    lambda model, rec: copy(f"{POST}@2", f"{POST}@2"),
    lambda model, rec: steer("**.hook_resid_post", torch.zeros(16)),
    lambda model, rec: steer("**.hook_resid_post", torch.ones(16), scale=0.0),
    lambda model, rec: ablate(POST, at=slice(0, 0)),
    lambda model, rec: ablate(POST, "resample", at=torch.zeros(3, 9, dtype=torch.bool)),
    lambda model, rec: ablate(POST, at=[]),
    lambda model, rec: patch("**.hook_resid_post", {s: v + 1 for s, v in rec.items()}, at=torch.tensor([])),
    lambda model, rec: steer(f"{POST}@2", torch.ones(16), at=()),
    lambda model, rec: freeze(0, at=np.array([], dtype=int)),
    lambda model, rec: skip_loop(2, at=[]),
    lambda model, rec: skip_layer(1, 2, at=range(0)),
    lambda model, rec: repeat_loop(2, times=1),
    lambda model, rec: swap_loops(1, 3),
    lambda model, rec: swap_layers(1, 1, 2),
    lambda model, rec: skip_loop(2, at=slice(0, 0)),
    lambda model, rec: swap_layers(1, 2, 2, at=torch.zeros(9, dtype=torch.bool)),
])
def test_identities_hold_bit_for_bit(make: Callable[..., Edit], model: HookedLoopMDM, tokens: Tensor) -> None:
    plain, rec = model.run_with_cache(tokens, N, names_filter=["**.hook_resid_post", "**.hook_mlp_out"])
    edited = make(model, rec)
    if edited.name.startswith("freeze"):  # it asks for patterns, and a materialised one rounds otherwise
        plain = model.run_with_hooks(tokens, N, fwd_hooks=[("**.attn.hook_pattern@*", lambda x, hook: None)])
    assert torch.equal(run(model, tokens, edited), plain)


@pytest.mark.parametrize("at", [[4, -1], (4, 8), range(4, 9, 4), np.array([4, 8]), torch.tensor([4, 8]).int(),
                                [False, False, False, False, True, False, False, False, True]])
def test_positions_may_be_written_in_many_ways(at: Any, model: HookedLoopMDM, tokens: Tensor) -> None:
    vector = torch.ones(16)
    assert torch.equal(run(model, tokens, steer(POST, vector, at=at)),
                       run(model, tokens, steer(POST, vector, at=torch.tensor([4, 8]))))
    assert torch.equal(run(model, tokens, steer(POST, vector, at=4)), run(model, tokens, steer(POST, vector, at=[4])))


@pytest.mark.parametrize(("at", "message"), [
    ([9], r"`at` chooses the positions \[9\], and this run has 9: 0\.\.8"),
    ([0, -10], r"`at` chooses the positions \[0, -10\]"),
    ([0.5], r"`at` chooses positions by a slice, whole numbers or booleans, not by \[0\.5\]"),
    (torch.zeros(1, 2, 3, dtype=torch.long), r"whole numbers or booleans"),
    (torch.zeros(0, dtype=torch.bool), r"one value for each of 9, not 0"),
])
@pytest.mark.unchecked
def test_positions_that_are_not_there_are_refused(at: Any, message: str, model: HookedLoopMDM, tokens: Tensor) -> None:
    for edited in (ablate(POST, at=at), skip_loop(2, at=at)):
        with pytest.raises(ValueError, match=message):
            run(model, tokens, edited)


def test_freezing_from_the_last_loop_changes_nothing(model: HookedLoopMDM, tokens: Tensor) -> None:
    asked_for = model.run_with_hooks(tokens, N, fwd_hooks=[("**.attn.hook_pattern@-1", lambda x, hook: None)])
    assert torch.equal(run(model, tokens, freeze(-1)), asked_for)


@pytest.mark.parametrize("twice", [swap_loops(1, 3), swap_layers(1, 2, 2)])
def test_swapping_twice_is_not_swapping(twice: Edit, tokens: Tensor) -> None:
    model = small_model(loop_embedding="learned", max_loops=N)
    plain = model(tokens, N)
    assert not torch.allclose(run(model, tokens, twice), plain)
    assert torch.equal(run(model, tokens, twice, twice), plain)


# --------------------------------------------------------------------------------- patches


def test_patching_from_another_run_and_another_loop(model: HookedLoopMDM, tokens: Tensor) -> None:
    others = small_tokens(seed=4)
    other, rec = model.run_with_cache(others, N, names_filter=POST)
    assert torch.equal(run(model, tokens, patch(f"{POST}@2", rec)), other)
    assert torch.equal(run(model, tokens, patch(f"{POST}@2", rec[f"{POST}@2"])), other)
    later = run(model, tokens, patch(f"{POST}@2", rec, source_site=f"{POST}@3"))
    assert torch.equal(later, model(others, N + 1))  # one loop ahead
    back = run(model, tokens, patch(f"{POST}@-1", rec, source_site=f"{POST}@0"))
    assert torch.equal(back, model(others, 1))


def test_patches_at_some_positions_are_those_of_torch_where(model: HookedLoopMDM, tokens: Tensor) -> None:
    _, rec = model.run_with_cache(small_tokens(seed=4), N, names_filter="blocks.1.**")
    _, own = model.run_with_cache(tokens, N, names_filter="blocks.1.**")
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    for hook in ("hook_resid_post", "attn.hook_q", "attn.hook_pattern", "mlp.hook_post"):
        site = f"blocks.1.{hook}@2"
        with edit(model, [patch(site, rec, at=mask)], n_loops=N):
            _, edited = model.run_with_cache(tokens, N, names_filter=["blocks.1.attn.hook_pattern", site])
        where = {"attn.hook_pattern": mask[:, None, :, None], "attn.hook_q": mask[:, :, None, None]}.get(hook)
        expected = torch.where(mask[:, :, None] if where is None else where, rec[site], own[site])
        torch.testing.assert_close(edited[site], expected, atol=1e-6, rtol=1e-5)


def test_copying_loop_into_loop(model: HookedLoopMDM, tokens: Tensor) -> None:
    assert torch.equal(run(model, tokens, copy(f"{POST}@1", f"{POST}@3")), model(tokens, N - 2))
    assert torch.equal(run(model, tokens, copy(f"{POST}@0", f"{POST}@-1")), model(tokens, 1))
    assert torch.equal(run(model, tokens, copy("hook_embed", "blocks.3.hook_resid_pre")),
                       model.tail(model.embed_tokens(tokens)))
    with edit(model, [copy("blocks.1.hook_attn_out@1", "blocks.1.hook_attn_out@2:4")], n_loops=N):
        _, rec = model.run_with_cache(tokens, N, names_filter="blocks.1.hook_attn_out")
    out = rec.stack("blocks.1.hook_attn_out")
    assert torch.equal(out[2], out[1])
    assert torch.equal(out[3], out[1])
    assert not torch.allclose(out[4], out[1])


def test_copying_back_in_time_is_refused(model: HookedLoopMDM, tokens: Tensor) -> None:
    message = "an activation can only be copied forward in time. Record a run, then patch"
    runs = model.clock.runs
    with pytest.raises(SiteError, match=message):
        run(model, tokens, copy(f"{POST}@3", f"{POST}@1"))
    assert model.clock.runs == runs
    with pytest.raises(SiteError, match=message):
        run(model, tokens, copy("blocks.3.hook_resid_post", f"{POST}@1"))


# ------------------------------------------------------------- ablation, steering, freezing


def test_ablations_write_what_they_say(model: HookedLoopMDM, tokens: Tensor) -> None:
    site = "blocks.1.hook_mlp_out@2"
    _, own = model.run_with_cache(tokens, N, names_filter=site)
    _, ref = model.run_with_cache(small_tokens(batch=7, seed=3), N, names_filter=site)

    def written(*edits: Edit) -> Tensor:
        with edit(model, edits, n_loops=N):
            return model.run_with_cache(tokens, N, names_filter=site)[1][site]

    x = own[site]
    assert not written(ablate(site)).any()
    torch.testing.assert_close(written(ablate(site, "mean")), x.mean((0, 1)).expand_as(x))
    torch.testing.assert_close(written(ablate(site, "mean", reference=ref)), ref[site].mean((0, 1)).expand_as(x))
    resampled = written(ablate(site, "resample", seed=5))
    rows = [next(j for j in range(3) if torch.equal(resampled[i], x[j])) for i in range(3)]
    assert sorted(rows) == [0, 1, 2]
    assert all(i != j for i, j in enumerate(rows))
    assert torch.equal(resampled, written(ablate(site, "resample", seed=5)))
    drawn = written(ablate(site, "resample", reference=ref))
    assert all(any(torch.equal(row, other) for other in ref[site]) for row in drawn)
    pattern = "blocks.1.attn.hook_pattern@2"
    with edit(model, [ablate(pattern, "mean")], n_loops=N):
        _, after = model.run_with_cache(tokens, N, names_filter=pattern)
    _, before = model.run_with_cache(tokens, N, names_filter=pattern)
    torch.testing.assert_close(after[pattern], before[pattern].mean(0).expand_as(before[pattern]))


def test_an_ablated_loop_layer_is_a_skipped_one(model: HookedLoopMDM, tokens: Tensor) -> None:
    out = [f"blocks.{layer}.hook_{part}_out@2" for layer in (1, 2) for part in ("attn", "mlp")]
    torch.testing.assert_close(run(model, tokens, ablate(out)), run(model, tokens, skip_loop(2)))


def test_resampling_uses_one_partner_at_every_site(model: HookedLoopMDM, tokens: Tensor) -> None:
    sites = [f"{POST}@1", f"{POST}@3"]
    _, own = model.run_with_cache(tokens, N, names_filter=sites)
    with edit(model, [ablate(sites, "resample", reference=own, seed=2)], n_loops=N):
        _, rec = model.run_with_cache(tokens, N, names_filter=sites)
    rows = [[next(j for j in range(3) if torch.equal(rec[s][i], own[s][j])) for i in range(3)] for s in sites]
    assert rows[0] == rows[1]


def test_steering_adds_the_vector_at_the_positions(model: HookedLoopMDM, tokens: Tensor) -> None:
    _, own = model.run_with_cache(tokens, N, names_filter=POST)
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    with edit(model, [steer(f"{POST}@2", vector, scale=-2.0, at=[0, 8])], n_loops=N):
        _, rec = model.run_with_cache(tokens, N, names_filter=POST)
    expected = own[f"{POST}@2"].clone()
    expected[:, [0, 8]] += -2 * vector
    assert torch.equal(rec[f"{POST}@2"], expected)
    both = run(model, tokens, steer(f"{POST}@2", vector), steer(f"{POST}@2", -vector))
    torch.testing.assert_close(both, model(tokens, N), atol=1e-4, rtol=1e-4)


def test_frozen_patterns_stay_and_values_go_on(model: HookedLoopMDM, tokens: Tensor) -> None:
    names = ["**.attn.hook_pattern", "blocks.1.attn.hook_v"]
    with edit(model, [freeze(1)], n_loops=N):
        _, rec = model.run_with_cache(tokens, N, names_filter=names)
    _, plain = model.run_with_cache(tokens, N, names_filter=names)
    for layer in (1, 2):
        patterns, before = (r.stack(f"blocks.{layer}.attn.hook_pattern") for r in (rec, plain))
        assert torch.equal(patterns[:2], before[:2])
        assert all(torch.equal(patterns[k], patterns[1]) for k in range(1, N))
        assert not torch.allclose(before[3], before[1])
    assert torch.equal(rec["blocks.0.attn.hook_pattern"], plain["blocks.0.attn.hook_pattern"])
    assert not torch.allclose(rec["blocks.1.attn.hook_v@3"], rec["blocks.1.attn.hook_v@2"])
    with edit(model, [freeze(1, "blocks.2.attn.hook_pattern", at=[3])], n_loops=N):
        _, part = model.run_with_cache(tokens, N, names_filter=names)
    stack = part.stack("blocks.2.attn.hook_pattern")
    assert torch.equal(stack[4][:, :, 3], stack[1][:, :, 3])
    assert not torch.allclose(stack[4][:, :, 4], stack[1][:, :, 4])


def test_edits_compose_in_the_order_in_which_they_are_listed(model: HookedLoopMDM, tokens: Tensor) -> None:
    v = torch.ones(16)
    site = f"{POST}@3"
    last = run(model, tokens, ablate(site), steer(site, v))
    assert torch.equal(last, run(model, tokens, patch(site, v.expand(3, 9, 16).contiguous())))
    assert torch.equal(run(model, tokens, steer(site, v), ablate(site)), run(model, tokens, ablate(site)))
    with edit(model, [skip_loop(0)], n_loops=N):  # contexts and lists are one and the same
        nested = run(model, tokens, steer(site, v))
    assert torch.equal(nested, run(model, tokens, steer(site, v), skip_loop(0)))
    assert not torch.allclose(nested, run(model, tokens, steer(site, v)))
    plain_hook = (site, lambda x, hook: x + 1)
    mixed = model.run_with_hooks(tokens, N, fwd_hooks=[plain_hook, steer(site, -v)])
    torch.testing.assert_close(mixed, model(tokens, N), atol=1e-4, rtol=1e-4)


def test_an_edit_can_be_used_again_and_carries_nothing_over(model: HookedLoopMDM, tokens: Tensor) -> None:
    others, again = small_tokens(seed=8), copy(f"{POST}@1", f"{POST}@3")
    first = run(model, tokens, again)
    assert torch.equal(run(model, others, again), model(others, N - 2))
    assert torch.equal(run(model, tokens, again), first)


def test_gradients_flow_through_edits(model: HookedLoopMDM, tokens: Tensor) -> None:
    vector = torch.zeros(16, requires_grad=True)
    with torch.enable_grad():
        run(model, tokens, steer(f"{POST}@2", vector), copy(f"{POST}@2", f"{POST}@3"))[..., 2].sum().backward()
    assert vector.grad is not None
    assert vector.grad.abs().max() > 0


# ---------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(("edits", "kind", "message"), [
    ([skip_loop(5)], SiteError, r"loop 5 cannot be skipped: this run has 5 loops, 0\.\.4"),
    ([repeat_loop(-6)], SiteError, "loop -6 cannot be repeated: this run has 5 loops"),
    ([swap_loops(0, 7)], SiteError, "loop 7 cannot be swapped"),
    ([swap_layers(0, 1, 2)], SiteError, "layer 0 does not run in loop 2; its layers are 1, 2"),
    ([skip_layer(3, 2)], SiteError, "layer 3 does not run in loop 2"),
    ([patch(f"{POST}@9", torch.zeros(3, 9, 16))], SiteError, "cannot fire"),
    ([patch(POST, {})], KeyError, r"blocks\.2\.hook_resid_post@0"),
    ([patch(POST, torch.zeros(3, 4, 16))], ValueError, r"the patch for .*@0 has shape \(3, 4, 16\), the activation "
                                                       r"\(3, 9, 16\): patch between runs of the same shape"),
    ([copy(POST, POST)], SiteError, "names 5 sites"),
    ([copy("blocks.1.attn.hook_q@1", f"{POST}@3")], ValueError, "copy between sites of one shape"),
    ([steer(POST, torch.ones(5))], ValueError, r"a vector of shape \(5,\) cannot be added at .*@0"),
    ([steer(POST, torch.ones(16), at=torch.ones(4, dtype=torch.bool))], ValueError, "one value for each of 9, not 4"),
    ([steer(POST, torch.ones(16), at=torch.ones(9, 3, dtype=torch.bool))], ValueError, r"boolean and \[batch, pos\]"),
    ([freeze(7)], SiteError, "cannot fire"),
    ([freeze(1, "blocks.0.attn.hook_pattern")], SiteError, "runs once per forward"),
    ([freeze((1, 0))], SiteError, r"looped over 1 cycle, and from_loop=\(1, 0\) names 2: give one number for each"),
    ([skip_loop(1), freeze(1)], SiteError, "cannot be frozen from loop 1: an edit of this run skips it there"),
])
def test_impossible_edits_are_refused(edits: list[Edit], kind: type[Exception], message: str, model: HookedLoopMDM,
                                      tokens: Tensor) -> None:
    plain = model(tokens, N)
    with pytest.raises(kind, match=message):
        run(model, tokens, *edits)
    assert torch.equal(model(tokens, N), plain)


@pytest.mark.unchecked
def test_options_are_checked(model: HookedLoopMDM, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="how must be 'zero', 'mean' or 'resample', not 'noise'"):
        ablate(POST, "noise")  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="the loops follow from from_loop; write"):
        freeze(1, "**.attn.hook_pattern@2")
    with pytest.raises(ValueError, match="repeated at least once"):
        repeat_loop(1, 0)
    with pytest.raises(ValueError, match="the batch holds only one: give a larger batch, or a reference"):
        run(model, tokens[:1], ablate(POST, "resample"))
    with (edit(model, [skip_loop(1)], n_loops=N),
          pytest.raises(ValueError, match="adaptive looping decides by itself which loops run: use a fixed n_loops")):
        model.forward_adaptive(tokens, threshold=0.1)
