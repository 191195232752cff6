"""A model is not run inside its own forward: whatever would record or edit the wrong forward is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM
from hooks.edits import skip_loop
from hooks.model.diffusion import SamplerConfig, sample
from hooks.model.sampling import record_sampling
from tests.small import small_model, small_tokens

SITE = "blocks.1.hook_resid_post"
OTHERS = small_tokens(seed=5)

RUNS: dict[str, Callable[[HookedLoopMDM], Any]] = {
    "forward": lambda model: model(OTHERS, 2),
    "hooked": lambda model: model.run_with_hooks(OTHERS, 2, fwd_hooks=[(SITE, lambda x, hook: x * 0)]),
    "recorded": lambda model: model.run_with_cache(OTHERS, 2),
    "recorded with gradients": lambda model: model.run_with_cache(OTHERS, 2, loss_fn=lambda logits: logits.sum()),
    "edited": lambda model: model.run_with_hooks(OTHERS, 3, fwd_hooks=[skip_loop(1)]),
    "adaptive": lambda model: model.forward_adaptive(OTHERS, threshold=0.0, max_loops=2),
    "sampled": lambda model: sample(model, OTHERS, SamplerConfig(n_steps=2)),
    "sampled and recorded": lambda model: record_sampling(model, OTHERS, SamplerConfig(n_steps=2),
                                                          lambda step, rec: None, names_filter=SITE),
    "one layer": lambda model: model.apply(1, *model.enter(OTHERS, 2)),
    "one loop": lambda model: model.loop(torch.zeros(3, 9, 16), 0, torch.zeros(3, 9, 16)),
}
"""Every way to run a model."""

OUTER: dict[str, Callable[..., Any]] = {
    "recording": lambda model, tokens, hooks: recorded(model, tokens, hooks),
    "hooks": lambda model, tokens, hooks: model.run_with_hooks(tokens, 3, fwd_hooks=hooks),
    "adaptive": lambda model, tokens, hooks: adaptive(model, tokens, hooks),
    "sampling": lambda model, tokens, hooks: sampled(model, tokens, hooks),
}
"""Every way in which a forward with hooks comes about; each returns one tensor."""


def recorded(model: HookedLoopMDM, tokens: Tensor, hooks: list[Any]) -> Tensor:
    with model.hooks(hooks, n_loops=3):
        return model.run_with_cache(tokens, 3, names_filter="blocks.*.hook_resid_post")[1].stack(SITE)


def adaptive(model: HookedLoopMDM, tokens: Tensor, hooks: list[Any]) -> Tensor:
    with model.hooks(hooks, n_loops=3):
        return model.forward_adaptive(tokens, threshold=0.0, max_loops=3).logits


def sampled(model: HookedLoopMDM, tokens: Tensor, hooks: list[Any]) -> Tensor:
    with model.hooks(hooks, n_loops=3):
        return sample(model, tokens, SamplerConfig(n_steps=2, n_loops=3),
                      generator=torch.Generator().manual_seed(0))[-1].after


def doubled(x: Tensor, *, hook: Any) -> Tensor:
    return 2 * x


def clean(model: HookedLoopMDM) -> None:
    assert not any(point.entries for point in model.hook_points.values())
    assert not model.replans
    assert (model.clock.thread, model.clock.within, model.clock.muted) == (None, None, False)


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("inner", RUNS)
def test_a_run_inside_a_hook_is_refused_and_the_outer_one_survives(inner: str, outer: str) -> None:
    model, tokens = small_model(), small_tokens()
    edit = [("blocks.1.hook_resid_post@1", doubled)]
    expected = OUTER[outer](model, tokens, edit)
    refused = []

    def runs_the_model(x: Tensor, *, hook: Any) -> None:
        with pytest.raises(RuntimeError, match=r"the model was run inside the hook at blocks\.0\.hook_resid_post"):
            RUNS[inner](model)
        refused.append(hook.site)

    seen = OUTER[outer](model, tokens, [("blocks.0.hook_resid_post", runs_the_model), *edit])
    assert refused
    assert torch.equal(seen, expected)
    clean(model)


@pytest.mark.parametrize("inner", RUNS)
def test_an_unhandled_refusal_leaves_a_model_as_it_was(inner: str) -> None:
    model, tokens = small_model(), small_tokens()
    before = model(tokens, 3)
    for outer in OUTER.values():
        with pytest.raises(RuntimeError, match="the model was run inside the hook at"):
            outer(model, tokens, [(f"{SITE}@1", lambda x, hook: RUNS[inner](model) and None)])
        clean(model)
    assert torch.equal(model(tokens, 3), before)


@pytest.mark.parametrize("inner", [name for name in RUNS if name != "one loop"])
def test_a_forward_inside_a_bare_module_hook_is_refused(inner: str) -> None:
    model, tokens = small_model(), small_tokens()
    handle = model.blocks[0].register_forward_hook(lambda *given: RUNS[inner](model) and None)
    with pytest.raises(RuntimeError, match="the model was run inside its own forward"):
        model(tokens, 3)
    handle.remove()
    clean(model)
    assert torch.equal(model(tokens, 3), small_model()(tokens, 3))


@pytest.mark.parametrize("inner", RUNS)
def test_a_run_inside_a_backward_hook_is_refused(inner: str) -> None:
    model, tokens = small_model(), small_tokens()
    _, expected = model.run_with_cache(tokens, 3, names_filter=SITE, loss_fn=lambda logits: logits[..., 0].sum())
    refused = []

    def runs_the_model(gradient: Tensor, *, hook: Any) -> None:
        with pytest.raises(RuntimeError, match=r"run inside the backward hook at blocks\.2\.hook_resid_post@2"):
            RUNS[inner](model)
        refused.append(hook.site)

    with model.hooks(bwd_hooks=[("blocks.2.hook_resid_post@2", runs_the_model)], n_loops=3):
        _, rec = model.run_with_cache(tokens, 3, names_filter=SITE, loss_fn=lambda logits: logits[..., 0].sum())
    assert refused == ["blocks.2.hook_resid_post@2"]
    assert torch.equal(rec.stack(SITE), expected.stack(SITE))
    assert torch.equal(rec.gradients.stack(SITE), expected.gradients.stack(SITE))
    clean(model)
    with model.hooks(bwd_hooks=[(SITE, lambda gradient, hook: RUNS[inner](model) and None)], n_loops=3):
        logits = model(tokens, 3)
        with pytest.raises(RuntimeError, match="run inside the backward hook at"):
            logits[..., 0].sum().backward()
    clean(model)


@pytest.mark.parametrize("inner", RUNS)
def test_a_run_inside_the_loss_of_a_recording_is_refused(inner: str) -> None:
    model, tokens = small_model(), small_tokens()
    with pytest.raises(RuntimeError, match="run inside run_with_cache's loss_fn"):
        model.run_with_cache(tokens, 3, names_filter=SITE, loss_fn=lambda logits: RUNS[inner](model) and logits.sum())
    clean(model)


def test_a_part_run_in_a_hook_is_refused_where_its_sites_are_hooked_and_allowed_elsewhere() -> None:
    model, tokens = small_model(), small_tokens()
    read: list[Tensor] = []

    def reads_the_lens(x: Tensor, *, hook: Any) -> None:
        read.append(model.unembed(x))

    hooks = [(f"{SITE}@*", reads_the_lens)]
    _, rec = model.run_with_cache(tokens, 3, names_filter=SITE)
    model.run_with_hooks(tokens, 3, fwd_hooks=hooks)
    assert torch.equal(torch.stack(read), model.unembed(rec.stack(SITE).flatten(0, 1)).unflatten(0, (3, 3)))
    with (pytest.raises(RuntimeError, match=rf"ln_final\.hook_scale fired inside the hook at {SITE}, where a part"),
          model.hooks(hooks, n_loops=3)):
        model.run_with_cache(tokens, 3)
    clean(model)


def test_another_model_and_an_unrolled_one_run_inside_a_hook() -> None:
    model, other, tokens = small_model(), small_model(seed=1), small_tokens()
    twin, bridge = copy.deepcopy(model), model.unroll(2)
    expected = {"other": other.run_with_cache(OTHERS, 2)[1].stack(SITE), "twin": twin(OTHERS, 2),
                "bridge": bridge(OTHERS)}
    _, alone = model.run_with_cache(tokens, 3)
    found: dict[str, Tensor] = {}

    def runs_others(x: Tensor, *, hook: Any) -> None:
        found["other"] = other.run_with_cache(OTHERS, 2)[1].stack(SITE)
        found["twin"], found["bridge"] = twin(OTHERS, 2), bridge(OTHERS)

    with model.hooks([(f"{SITE}@1", runs_others)], n_loops=3):
        _, rec = model.run_with_cache(tokens, 3)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(torch.equal(rec[site], alone[site]) for site in alone)
    clean(model)


def test_a_copy_made_in_a_hook_runs_no_forward() -> None:
    model, tokens = small_model(), small_tokens()
    copies: list[HookedLoopMDM] = []
    model.run_with_hooks(tokens, 2, fwd_hooks=[("hook_embed", lambda x, hook: copies.append(copy.deepcopy(model)))])
    copies[0].reset_hooks()
    for one in (copies[0], pickle.loads(pickle.dumps(copies[0]))):
        assert torch.equal(one(tokens, 2), model(tokens, 2))
        assert one.run_with_hooks(tokens, 2, fwd_hooks=[(SITE, doubled)]).isfinite().all()


def test_a_forward_in_another_thread_waits_for_the_one_that_is_running() -> None:
    model, tokens = small_model(), small_tokens()
    expected, outcome = model(OTHERS, 2), []
    theirs = threading.Thread(target=lambda: outcome.append(model(OTHERS, 2)))

    def starts_another(x: Tensor, *, hook: Any) -> None:
        theirs.start()
        theirs.join(0.1)
        assert not outcome

    _, alone = model.run_with_cache(tokens, 3, names_filter=SITE)
    with model.hooks([("hook_embed", starts_another)], n_loops=3):
        _, rec = model.run_with_cache(tokens, 3, names_filter=SITE)
    theirs.join()
    assert torch.equal(outcome[0], expected)
    assert torch.equal(rec.stack(SITE), alone.stack(SITE))


def test_a_backward_pass_in_a_thread_of_its_own_is_refused_and_does_not_wait() -> None:
    """As on a GPU, where torch calls gradient hooks from another thread than the one that holds the model."""
    model, tokens = small_model(), small_tokens()
    messages: list[str] = []

    def runs_the_model(gradient: Tensor, *, hook: Any) -> None:
        with pytest.raises(RuntimeError, match="run inside the backward hook at") as refused:
            model(tokens, 2)
        messages.append(str(refused.value))

    with model.hooks(bwd_hooks=[(f"{SITE}@0", runs_the_model)], n_loops=2):
        logits = model(tokens, 2)
        thread = threading.Thread(target=lambda: logits.sum().backward())
        thread.start()
        thread.join()
    assert len(messages) == 1
    clean(model)

