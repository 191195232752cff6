"""Loops and layers skipped, repeated and swapped: the same as running them so by hand, and undone afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM, SiteError
from hooks.edits import (
    edit,
    repeat_loop,
    skip_layer,
    skip_loop,
    swap_layers,
    swap_loops,
)
from tests.small import small_model
from tests.small_edits import POST, N, failing, run, state_after, unedited

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_skipping_a_loop_is_running_one_fewer(model: HookedLoopMDM, tokens: Tensor) -> None:
    fewer = model(tokens, N - 1)
    for k in range(N):
        assert torch.equal(run(model, tokens, skip_loop(k)), fewer)
    assert torch.equal(run(model, tokens, skip_loop(1), skip_loop(-1)), model(tokens, N - 2))
    everything = [skip_loop(k) for k in range(N)]
    assert torch.equal(run(model, tokens, *everything), model.tail(model.head(model.embed_tokens(tokens))))


def test_repeating_a_loop_is_running_more(model: HookedLoopMDM, tokens: Tensor) -> None:
    assert torch.equal(run(model, tokens, repeat_loop(2, 3)), model(tokens, N + 2))
    with edit(model, [repeat_loop(2)], n_loops=N):
        _, rec = model.run_with_cache(tokens, N, names_filter=POST)
    assert torch.equal(rec.stack(POST), model.run_with_cache(tokens, N + 1, names_filter=POST)[1].stack(POST))
    assert rec.topology is not None
    assert rec.topology.n_loops == N + 1


def test_the_loop_embedding_tells_skipped_repeated_and_swapped_loops_apart(tokens: Tensor) -> None:
    model = small_model(loop_embedding="learned", max_loops=N)
    embedded = model.embed_tokens(tokens)

    def by_hand(*order: int) -> Tensor:
        x = model.head(embedded)
        for k in order:
            x = model.loop(x, k, embedded)
        return model.tail(x)

    assert torch.equal(run(model, tokens, skip_loop(1)), by_hand(0, 2, 3, 4))
    assert torch.equal(run(model, tokens, repeat_loop(1)), by_hand(0, 1, 1, 2, 3, 4))
    assert torch.equal(run(model, tokens, swap_loops(1, 3)), by_hand(0, 3, 2, 1, 4))
    assert torch.equal(run(model, tokens, repeat_loop(1), skip_loop(3), swap_loops(0, -1)), by_hand(4, 1, 1, 3, 0))


def test_layers_swapped_or_skipped_within_a_loop(model: HookedLoopMDM, tokens: Tensor) -> None:
    straight = [[1, 2]] * N
    assert torch.equal(state_after(model, tokens, *straight), model(tokens, N))
    swapped = [*straight[:3], [2, 1], *straight[4:]]
    assert torch.equal(run(model, tokens, swap_layers(1, 2, 3)), state_after(model, tokens, *swapped))
    for layer, rest in ((1, 2), (2, 1)):
        expected = state_after(model, tokens, *straight[:3], [rest], *straight[4:])
        assert torch.equal(run(model, tokens, skip_layer(layer, 3)), expected)
        assert torch.equal(run(model, tokens, skip_layer(layer, 3, at=slice(None))), expected)
    both = run(model, tokens, skip_layer(1, 3), skip_layer(2, 3))
    assert torch.equal(both, model(tokens, N - 1))


def test_sites_of_what_is_skipped_are_refused_before_the_run(model: HookedLoopMDM, tokens: Tensor) -> None:
    with edit(model, [skip_loop(2), skip_layer(1, 3)], n_loops=N):
        runs = model.clock.runs
        for site in (f"{POST}@2", "hook_loop_in@2", "blocks.1.hook_resid_post@3"):
            with pytest.raises(SiteError, match=r"cannot fire: this run does not come to it, because an edit skips"):
                model.run_with_cache(tokens, N, names_filter=site)
        assert model.clock.runs == runs
        logits, rec = model.run_with_cache(tokens, N)
        assert torch.isfinite(logits).all()
    assert f"{POST}@2" not in rec
    assert {f"{POST}@{k}" for k in (0, 1, 3, 4)} <= set(rec)
    assert "blocks.1.hook_resid_post@3" not in rec
    with pytest.raises(SiteError, match="was not recorded"):
        rec.stack(POST)


def test_plan_edits_are_undone(model: HookedLoopMDM, tokens: Tensor) -> None:
    plain = model(tokens, N)
    with edit(model, [skip_loop(0), skip_loop(1)], n_loops=N):
        with edit(model, [skip_loop(2)], n_loops=N):
            assert torch.equal(model(tokens, N), unedited(model, tokens, 2))
        assert torch.equal(model(tokens, N), unedited(model, tokens, 3))
        with pytest.raises(KeyError, match="stop"):
            model.run_with_hooks(tokens, N, fwd_hooks=[skip_loop(3), (f"{POST}@2", failing)])
        assert torch.equal(model(tokens, N), unedited(model, tokens, 3))
    assert torch.equal(model(tokens, N), plain)
    assert model.replans == ()


@pytest.mark.parametrize("at", [slice(2, 5), torch.tensor([2, 3, 4]), [2, 3, 4], torch.arange(9).sub(3).abs() < 2,
                                (torch.arange(9).sub(3).abs() < 2).expand(3, 9)])
def test_plan_edits_at_some_positions(at: Any, model: HookedLoopMDM, tokens: Tensor) -> None:
    names = "hook_loop_in"
    there = torch.arange(9).sub(3).abs() < 2
    _, plain = model.run_with_cache(tokens, N, names_filter=[names, POST])
    for make in (lambda at: skip_loop(2, at=at), lambda at: swap_layers(1, 2, 2, at=at)):
        after = []
        for where in (at, None):
            with edit(model, [make(where)], n_loops=N):
                after.append(model.run_with_cache(tokens, N, names_filter=f"{names}@3")[1][f"{names}@3"])
        partly, wholly = after
        assert torch.equal(partly[:, there], wholly[:, there])
        assert torch.equal(partly[:, ~there], plain[f"{names}@3"][:, ~there])
        assert not torch.allclose(partly, wholly)
    with edit(model, [repeat_loop(2, at=at)], n_loops=N):
        _, rec = model.run_with_cache(tokens, N, names_filter=[names, POST])
    assert torch.equal(rec[f"{names}@4"][:, there], plain[f"{names}@4"][:, there])    # looped once more
    assert torch.equal(rec[f"{names}@4"][:, ~there], plain[f"{names}@3"][:, ~there])  # left alone
    assert torch.equal(rec[f"{POST}@2"], plain[f"{POST}@2"])                          # sites show the pass itself
