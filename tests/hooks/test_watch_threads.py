"""Whatever other threads do with the model, and however a block ends, watch leaves no hook behind."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hooks.foreign.watching import watch
from hooks.sites import SiteError
from tests.small_looped import Looped, n_hooks, states


class Pausing(nn.Module):
    """In its nth call in a thread other than the main one it waits until it is let go."""

    def __init__(self, nth: int):
        super().__init__()
        self.nth, self.calls = nth, 0
        self.reached, self.go_on = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            self.calls += 1
            if self.calls == self.nth:
                self.reached.set()
                assert self.go_on.wait(20)
        return x


class Model(Looped):
    """A forward in another thread stops in the loop of its dry run (nth=2), or of the forward proper (nth=6)."""

    def __init__(self, nth: int):
        super().__init__()
        self.core.append(Pausing(nth))

    def in_thread(self) -> tuple[threading.Thread, list[Any]]:
        ended: list[Any] = []

        def run() -> None:
            try:
                ended.append(self(states()))
            except Exception as error:
                ended.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        assert self.core[2].reached.wait(20)
        return thread, ended

    def let_go(self, thread: threading.Thread) -> None:
        self.core[2].go_on.set()
        thread.join(20)
        assert not thread.is_alive()


def as_ever(model: Model) -> None:
    assert not n_hooks(model)
    assert torch.equal(model(states()), model(states()))
    with watch(model, "core.0.hook_out") as rec:
        model(states())
    assert len(rec) == 4
    assert not n_hooks(model)


@pytest.mark.parametrize("nth", [1, 2, 6], ids=["first call of the dry run", "dry run", "forward"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_block_ends_while_another_thread_is_in_its_first_forward(nth: int, fails: bool) -> None:
    model = Model(nth)
    state = torch.get_rng_state()
    begun: list[Any] = []

    def block() -> None:
        with watch(model, "core.**.hook_out", seed=3 if nth > 2 else None):
            begun.extend(model.in_thread())
            if fails:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError if fails else RuntimeError):
        block()
    model.let_go(begun[0])
    assert torch.equal(begun[1][0], model(states()))
    assert torch.equal(torch.get_rng_state(), state)
    as_ever(model)


@pytest.mark.parametrize("nth", [2, 6], ids=["dry run", "forward"])
def test_two_threads_begin_at_once_and_the_second_is_refused(nth: int) -> None:
    model = Model(nth)
    with watch(model, "core.0.hook_out") as rec:
        thread, ended = model.in_thread()
        with pytest.raises(RuntimeError, match="called from two threads at once"):
            model(states())
        model.let_go(thread)
        assert torch.equal(ended[0], model(states()))
    assert len(rec) == 4
    as_ever(model)


def test_another_thread_that_runs_the_model_as_it_is_being_unwatched_again_and_again() -> None:
    model, stop, errors = Looped(), threading.Event(), []

    def keep_running() -> None:
        while not stop.is_set():
            try:
                model(states())
            except Exception as error:
                errors.append(str(error))

    threads = [threading.Thread(target=keep_running) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            try:
                with watch(model, "core.**.hook_out"):
                    model(states())
            except RuntimeError as error:
                errors.append(str(error))
    finally:
        stop.set()
    for thread in threads:
        thread.join(20)
    torch_itself = "mutated during iteration"  # a dict of hooks, as it lists those to call
    assert [error for error in errors if "two threads at once" not in error and "not run in the block" not in error
            and torch_itself not in error] == []
    assert not n_hooks(model)
    assert torch.equal(model(states()), model(states()))


@pytest.mark.parametrize("fail", [
    lambda model: watch(model, "core.9.hook_out"),
    lambda model: watch(model, ["core.0.hook_out", "core.0.hook_out@7"]),
    lambda model: watch(model, "core.0.hook_out", fwd_hooks=[("core.1.hook_in@5", lambda value, hook: value)]),
], ids=["no such module", "no such loop", "no such place for an edit"])
def test_a_site_that_turns_out_not_to_exist_leaves_nothing_attached(fail: Callable[[nn.Module], Any]) -> None:
    model = Looped()
    def block() -> None:
        with fail(model):
            for _ in range(2):  # the second forward is told the same, and is not half watched
                hooks = n_hooks(model)
                with pytest.raises(SiteError):
                    model(states())
                assert n_hooks(model) == hooks

    with pytest.raises(RuntimeError, match="not run in the block"):
        block()
    assert not n_hooks(model)


def test_a_dry_run_does_not_count_what_other_threads_call() -> None:
    model = Model(2)
    with watch(model, "core.0.hook_out") as rec:
        thread, _ = model.in_thread()      # in the dry run, in its second loop
        model.core[0](states())            # a module of the model, used by itself in this thread
        model.let_go(thread)
    assert len(rec) == 4


@pytest.mark.parametrize("schedule", [{"core": 4}, None], ids=["declared", "discovered"])
def test_a_forward_that_another_thread_began_before_the_watch_is_not_recorded(schedule: Any) -> None:
    model, x = Model(2), states()
    thread, ended = model.in_thread()
    with watch(model, "core.**.hook_out", schedule=schedule,
               fwd_hooks=[("core.0.hook_out@3", lambda value, hook: value * 0)]) as rec:
        def let_go(value: Tensor, hook: Any) -> None:
            model.let_go(thread)

        with watch(model, (), schedule=schedule, fwd_hooks=[("core.0.hook_out@2", let_go)]):
            model(x)  # in its third loop, the other forward goes on to its end
    assert len(rec.stack("core.0.hook_out")) == 4
    assert not rec["core.0.hook_out@3"].any()
    assert torch.equal(ended[0], model(x))
