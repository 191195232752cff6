"""Edits under gradient checkpointing: the gradients of the edited run, or an error, and never those of another run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hooks import HookedLoopMDM
from hooks.edits import Edit, edit, patch, skip_loop, steer
from hooks.foreign.watching import watch
from tests.small import MASK, small_model, small_tokens
from tests.small_edits import POST
from tests.small_looped import SCHEDULE, Looped, states

GONE = r"the backward pass runs a part of the model again .*edited in the forward pass .*, without the edit"

kinds = pytest.mark.parametrize("reentrant", [True, False])


@contextmanager
def checkpointed(model: HookedLoopMDM, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each block of ``model`` under its own checkpoint."""
    with monkeypatch.context() as patched:
        for block in model.blocks:
            def saving(*args: Any, _forward: Any = block.forward) -> Tensor:
                return checkpoint(_forward, *args, use_reentrant=reentrant)

            patched.setattr(block, "forward", saving)
        yield


def loss(logits: Tensor) -> Tensor:
    return logits[..., :MASK].pow(2).sum()


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


def same_as_unedited(model: HookedLoopMDM, tokens: Tensor) -> None:
    plain = small_model()
    loss(plain(tokens, 3)).backward()
    for ours, theirs in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(ours, theirs)


EDITS: list[Callable[[], Any]] = [
    lambda: steer(f"{POST}@1", torch.linspace(-1, 1, 16)),
    lambda: patch("blocks.1.hook_mlp_out@0", torch.linspace(-1, 1, 16).expand(3, 9, 16)),
    lambda: ("blocks.2.attn.hook_z@2", lambda z, hook: z * 2),
]


@kinds
@pytest.mark.parametrize("make", EDITS)
def test_backward_in_the_block_gives_the_gradients_of_the_edited_run(make: Any, reentrant: bool,
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model, tokens = small_model(), small_model(), small_tokens()
    with expected.hooks([make()], n_loops=3):
        loss(expected(tokens, 3)).backward()
    with checkpointed(model, reentrant, monkeypatch), model.hooks([make()], n_loops=3):
        loss(model(tokens, 3)).backward()
    for ours, theirs in zip(gradients(model), gradients(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


@kinds
@pytest.mark.parametrize("make", EDITS)
def test_backward_after_the_block_is_an_error(make: Any, reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = small_model(), small_tokens()
    with checkpointed(model, reentrant, monkeypatch):
        with model.hooks([make()], n_loops=3):
            logits = model(tokens, 3)
        with pytest.raises(RuntimeError, match=GONE + ".*Call backward inside the block"):
            loss(logits).backward()
        logits = model.run_with_hooks(tokens, 3, fwd_hooks=[make()])
        with pytest.raises(RuntimeError, match=GONE):
            loss(logits).backward()
        model.zero_grad()
        loss(model(tokens, 3)).backward()  # other forwards of the model are left in peace
    same_as_unedited(model, tokens)


@kinds
def test_a_whole_forward_under_one_checkpoint_or_two(reentrant: bool) -> None:
    model, tokens, start = small_model(), small_tokens(), torch.zeros((), requires_grad=True)
    edits: list[Edit] = [skip_loop(1), steer(f"{POST}@2", torch.ones(16))]

    def run(start: Tensor) -> Tensor:
        return loss(model(tokens, 3)) + start

    def saved(start: Tensor) -> Tensor:
        return checkpoint(run, start, use_reentrant=reentrant)

    for part in edits:
        for function in (run, saved):
            with edit(model, [part], n_loops=3):
                out = checkpoint(function, start, use_reentrant=reentrant)
            with pytest.raises(RuntimeError, match=GONE):
                out.backward()
            with edit(model, [part], n_loops=3):
                checkpoint(function, start, use_reentrant=reentrant).backward()


@kinds
def test_hooks_that_come_between_forward_and_backward_do_not_act(reentrant: bool,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, start = small_model(), small_tokens(), torch.zeros((), requires_grad=True)
    with checkpointed(model, reentrant, monkeypatch):
        logits = model(tokens, 3)
        fired: list[str] = []
        late = [steer(f"{POST}@*", torch.ones(16)), (POST, lambda x, hook: fired.append(hook.site))]
        with model.hooks(late, n_loops=3):
            loss(logits).backward()
    same_as_unedited(model, tokens)
    assert not fired
    out = checkpoint(lambda start: loss(model(tokens, 3)) + start, start, use_reentrant=reentrant)
    with (edit(model, [skip_loop(1)], n_loops=3),
          pytest.raises(RuntimeError, match=r"was not there in the forward pass: call backward before placing it")):
        out.backward()


@kinds
def test_recording_goes_on_as_if_nothing_were_checkpointed(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = small_model(), small_tokens()
    seen: list[str] = []
    with checkpointed(model, reentrant, monkeypatch):
        logits, _ = model.run_with_cache(tokens, 3, names_filter=POST)
        loss(logits).backward()
        same_as_unedited(model, tokens)
        with model.hooks([(POST, lambda x, hook: seen.append(hook.site))], n_loops=3):
            loss(model(tokens, 3)).backward()
    assert seen == [f"{POST}@{k}" for k in range(3)]  # once, and in the order of the forward pass


def test_gradients_are_recorded_as_if_nothing_were_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model, tokens = small_model(), small_model(), small_tokens()
    edits = [steer(f"{POST}@1", torch.ones(16))]
    with expected.hooks(edits, n_loops=3):
        _, want = expected.run_with_cache(tokens, 3, names_filter=POST, loss_fn=loss)
    with checkpointed(model, False, monkeypatch), model.hooks(edits, n_loops=3):
        _, rec = model.run_with_cache(tokens, 3, names_filter=POST, loss_fn=loss)
    with (checkpointed(model, True, monkeypatch), pytest.raises(RuntimeError, match=r"no gradient reaches"),
          model.hooks(edits, n_loops=3)):
        model.run_with_cache(tokens, 3, names_filter=POST, loss_fn=loss)
    assert list(rec.gradients) == list(want.gradients)
    for site in want:
        torch.testing.assert_close(rec[site], want[site])
        torch.testing.assert_close(rec.gradients[site], want.gradients[site])


@kinds
def test_edits_under_watch_too(reentrant: bool) -> None:
    class Saving(Looped):
        def forward(self, x: Tensor) -> Tensor:
            x = self.prelude(x)
            for _ in range(4):
                x = checkpoint(lambda x: torch.tanh(self.core[0](x)), x, use_reentrant=reentrant)
            return self.coda(x)

    model, x = Saving(), states()
    with watch(model, (), schedule=SCHEDULE, fwd_hooks=[("core.0.hook_out@1", lambda v, hook: v * 2)]):
        out = model(x)
    with pytest.raises(RuntimeError, match=GONE + r".*Switch checkpointing off"):
        out.sum().backward()
