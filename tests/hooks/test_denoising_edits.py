"""Edits addressed to a denoising step: they act in that step of the sampler, and in no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM, Recording, SiteError
from hooks.edits import (
    Edit,
    Steps,
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
from hooks.foreign.watching import watch
from hooks.model.diffusion import DenoisingStep, SamplerConfig, sample
from hooks.model.loopmdm import LoopMDM
from hooks.model.sampling import record_sampling
from tests.small import MASK, small_config, small_model
from tests.small_edits import POST
from tests.small_looped import SCHEDULE, looped, states

CONFIG = SamplerConfig(n_steps=4, n_loops=3, order="confidence", temperature=0)
PROMPT = torch.full((3, 9), MASK)

MAKERS: dict[str, Any] = {
    "patch": lambda **where: patch(f"{POST}@1", torch.linspace(-3, 3, 16).expand(3, 9, 16), **where),
    "copy": lambda **where: copy(f"{POST}@0", f"{POST}@2", **where),
    "ablate": lambda **where: ablate("blocks.*.hook_mlp_out", **where),
    "steer": lambda **where: steer(f"{POST}@1", torch.linspace(-3, 3, 16), **where),
    "freeze": lambda **where: freeze(0, **where),
    "skip_loop": lambda **where: skip_loop(1, **where),
    "repeat_loop": lambda **where: repeat_loop(1, 3, **where),
    "swap_loops": lambda **where: swap_loops(0, 2, **where),
    "swap_layers": lambda **where: swap_layers(1, 2, 1, **where),
    "skip_layer": lambda **where: skip_layer(1, 1, **where),
    "skip_layer at": lambda **where: skip_layer(1, 1, at=[0, 1, 2], **where),
}


@pytest.fixture
def model() -> HookedLoopMDM:
    return small_model(loop_embedding="learned")


def by_hand(model: HookedLoopMDM, edited: Edit, steps: set[int]) -> list[Tensor]:
    """The sampler's tokens after each step, a step at a time, with ``edited`` in force in ``steps`` alone."""
    tokens, after = PROMPT, []
    for step in range(CONFIG.n_steps):
        t, s = 1 - step / CONFIG.n_steps, 1 - (step + 1) / CONFIG.n_steps
        with torch.no_grad():
            logits = (model.run_with_hooks(tokens, 3, fwd_hooks=[edited], t=t) if step in steps
                      else model(tokens, 3, t=t))
        probability, predicted = logits.softmax(-1).max(-1)
        masked = tokens == MASK
        quota = torch.ceil(masked.sum(1) * (1 - s / t) - 1e-6)
        rank = probability.masked_fill(~masked, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        tokens = torch.where(masked & (rank < quota[:, None]), predicted, tokens)
        after.append(tokens)
    return after


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize(("step", "steps"), [(2, {2}), (-1, {3}), (slice(1, 3), {1, 2}), ([0, 3], {0, 3}),
                                             (None, {0, 1, 2, 3})])
def test_an_edit_acts_in_its_steps_alone(name: str, step: Steps | None, steps: set[int], model: HookedLoopMDM) -> None:
    trace = sample(model, PROMPT, CONFIG, fwd_hooks=[MAKERS[name](step=step)])
    for ours, theirs in zip(trace, by_hand(model, MAKERS[name](), steps), strict=True):
        assert torch.equal(ours.after, theirs)


def test_the_logits_of_each_step_show_where_it_acts(model: HookedLoopMDM) -> None:
    hooks = [MAKERS["steer"](step=1), ablate(f"{POST}@0", step=[1, 3])]
    seen: list[tuple[Tensor, Tensor]] = []

    def look(step: DenoisingStep, rec: Recording) -> None:
        with torch.no_grad():  # the callback may run the model: no edit of the sampler is in force there
            seen.append((rec[f"{POST}@2"], model.run_with_cache(step.before, 3, names_filter=POST)[1][f"{POST}@2"]))

    record_sampling(model, PROMPT, CONFIG, look, names_filter=POST, fwd_hooks=hooks)
    assert [torch.equal(*pair) for pair in seen] == [True, False, True, False]


def test_recordings_follow_the_loops_of_each_step(model: HookedLoopMDM) -> None:
    loops: list[list[str]] = []
    record_sampling(model, PROMPT, CONFIG, lambda step, rec: loops.append(list(rec)), names_filter=POST,
                    fwd_hooks=[repeat_loop(1, step=1), skip_loop(1, step=2)])
    every = [f"{POST}@{k}" for k in range(4)]
    assert loops == [every[:3], every, [every[0], every[2]], every[:3]]


def test_hooks_act_in_every_step_and_are_gone_afterwards(model: HookedLoopMDM) -> None:
    fired: list[str] = []
    hook = (f"{POST}@1", lambda x, hook: fired.append(hook.site))
    plain = sample(model, PROMPT, CONFIG)
    with edit(model, [MAKERS["swap_loops"]()], n_loops=3):  # what is in force already takes part
        both = sample(model, PROMPT, CONFIG, fwd_hooks=[(f"{POST}@0", lambda x, hook: None), MAKERS["steer"](step=0)])
        assert torch.equal(sample(model, PROMPT, CONFIG)[0].probability,
                           sample(model, PROMPT, CONFIG, fwd_hooks=[MAKERS["steer"](step=1)])[0].probability)
    assert not torch.equal(both[0].probability, plain[0].probability)
    sample(model, PROMPT, CONFIG, fwd_hooks=[hook])
    assert fired == [f"{POST}@1"] * 4
    assert torch.equal(sample(model, PROMPT, CONFIG)[-1].after, plain[-1].after)
    assert not any(point.entries for point in model.hook_points.values())


@pytest.mark.unchecked
@pytest.mark.parametrize("step", [4, -5, [0, 7], slice(4, None), [], slice(2, 2), "2"])
@pytest.mark.parametrize("name", ["steer", "skip_loop"])
def test_a_step_that_never_comes_is_refused_before_the_run(name: str, step: Any, model: HookedLoopMDM) -> None:
    runs = model.clock.runs
    for run in (lambda hooks: sample(model, PROMPT, CONFIG, fwd_hooks=hooks),
                lambda hooks: record_sampling(model, PROMPT, CONFIG, lambda step, rec: None, names_filter=POST,
                                              fwd_hooks=hooks)):
        with pytest.raises(SiteError, match=r"is addressed to denoising step .*, which never comes: this run has 4 "
                                            r"steps, 0\.\.3"):
            run([MAKERS[name](step=step)])
    assert model.clock.runs == runs


def test_sites_of_late_steps_are_refused_before_the_run(model: HookedLoopMDM) -> None:
    runs = model.clock.runs
    for hooks in ([steer(f"{POST}@3", torch.ones(16), step=3)], [skip_loop(5, step=2)],
                  [skip_loop(1, step=2), steer(f"{POST}@1", torch.ones(16), step=2)]):
        with pytest.raises(SiteError, match="cannot"):
            sample(model, PROMPT, CONFIG, fwd_hooks=hooks)
    adaptive = SamplerConfig(n_steps=2, n_loops=3, exit_threshold=0.1)
    with pytest.raises(ValueError, match="leave out exit_threshold"):
        sample(model, PROMPT, adaptive, fwd_hooks=[skip_loop(1, step=1)])
    assert model.clock.runs == runs
    with pytest.raises(ValueError, match="hooks and edits need a HookedLoopMDM"):
        sample(LoopMDM(small_config()), PROMPT, CONFIG, fwd_hooks=[MAKERS["steer"](step=1)])


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_single_forward_has_no_step(name: str, model: HookedLoopMDM) -> None:
    message = r"is addressed to denoising step 2, and a forward by itself is no step: give it to sample or record_samp"
    for run in (lambda hooks: model.run_with_hooks(PROMPT, 3, fwd_hooks=hooks),
                lambda hooks: edit(model, hooks, n_loops=3).__enter__()):
        with pytest.raises(ValueError, match=message):
            run([MAKERS[name](step=2)])
    assert model.replans == ()
    with (pytest.raises(ValueError, match=r"is addressed to denoising step 2"),
          watch(looped(), (), schedule=SCHEDULE, fwd_hooks=[ablate("core.0.hook_out@1", step=2)])):
        looped()(states())
