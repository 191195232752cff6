"""Hooks that cannot work are refused before the run or after it, and everything is undone whatever happens."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM, SiteError
from hooks.edits import edit, skip_loop, steer
from tests.small import MASK, attached, small_model, small_tokens


@pytest.mark.parametrize("site", ["blocks.1.hook_resid_post@3", "blocks.1.hook_resid_pots", "blocks.9.*",
                                  "blocks.0.hook_resid_post@0", ["hook_embed", "blocks.1.hook_resid_post@7"]])
def test_sites_that_cannot_fire_are_refused_before_the_run(site: Any) -> None:
    model, tokens = small_model(), small_tokens()
    runs = model.clock.runs
    with pytest.raises(SiteError):
        model.run_with_hooks(tokens, n_loops=3, fwd_hooks=[(site, lambda x, hook: None)])
    with pytest.raises(SiteError):
        model.run_with_cache(tokens, n_loops=3, names_filter=site)
    with pytest.raises(SiteError):
        model.add_hook(site, lambda x, hook: None, n_loops=3)
    with (pytest.raises(SiteError),
          model.hooks([("hook_embed", lambda x, hook: None), (site, lambda x, hook: None)], n_loops=3)):
        pytest.fail("the block must not be entered")
    assert model.clock.runs == runs
    assert attached(model) == 0


def test_the_refusal_names_the_nearest_site_and_the_remedy() -> None:
    with pytest.raises(SiteError) as error:
        small_model().run_with_cache(small_tokens(), n_loops=3, names_filter="blocks.1.hook_resid_post@9")
    assert str(error.value) == ("'blocks.1.hook_resid_post@9' cannot fire: blocks.1.hook_resid_post runs 3 loops here, "
                                "numbered 0..2. Nearest: 'blocks.1.hook_resid_post@2'. Pass a larger n_loops to run "
                                "more.")


def test_a_hook_that_should_have_fired_and_did_not_is_an_error_after_the_run() -> None:
    model, tokens = small_model(), small_tokens()
    with (pytest.raises(RuntimeError, match=r"1 hooked site\(s\) never fired, blocks.1.hook_resid_post@3 first: the "
                                            r"hooks were placed for 4 loops and the last forward ran 2. Give hooks"),
          model.hooks([("blocks.1.hook_resid_post@3", lambda x, hook: None)], n_loops=4)):
        model(tokens, 2)
    assert attached(model) == 0
    with model.hooks([("blocks.1.hook_resid_post@3", lambda x, hook: None)], n_loops=4):
        pass  # no forward, no complaint


def test_functions_on_gradients_that_never_fire_are_an_error_and_a_site_counts_once() -> None:
    model, tokens = small_model(), small_tokens()
    hooks: Any = [("blocks.1.hook_resid_post@3", lambda x, hook: None)]
    with (pytest.raises(RuntimeError, match=r"1 hooked site\(s\) never fired, blocks.1.hook_resid_post@3 first"),
          model.hooks(hooks, bwd_hooks=hooks, n_loops=4)):
        model(tokens, 2)
    with (pytest.raises(RuntimeError, match=r"1 hooked site\(s\) never fired, blocks.1.hook_resid_post@3 first"),
          model.hooks(bwd_hooks=hooks, n_loops=4)):
        model(tokens, 2)


def test_a_loop_that_adaptive_looping_left_out_is_no_error() -> None:
    model, tokens = small_model(), small_tokens()
    with model.hooks([("blocks.1.hook_resid_post@3", lambda x, hook: None)], n_loops=4):
        _, used = model.forward_adaptive(tokens, threshold=1e6, max_loops=4)
    assert used.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_hooks_are_removed_after_exceptions(kind: type[BaseException]) -> None:
    model, tokens = small_model(), small_tokens()

    def fail(x: Tensor, *, hook: Any) -> None:
        raise kind(hook.site)

    with torch.no_grad():
        plain = model(tokens, 3)
        hooks = [("**.hook_resid_post", lambda x, hook: x * 2), ("blocks.2.hook_resid_post@1", fail)]
        with pytest.raises(kind, match=r"blocks\.2\.hook_resid_post@1"):
            model.run_with_hooks(tokens, 3, fwd_hooks=hooks)
        assert attached(model) == 0
        with pytest.raises(kind), model.hooks(hooks, n_loops=3):
            raise kind
        assert attached(model) == 0
        assert torch.equal(model(tokens, 3), plain)
        with pytest.raises(TypeError, match=r"the reducer returned float at .*it must return a tensor"):
            model.run_with_cache(tokens, reduce=lambda x, name: float(x.mean()))
        assert attached(model) == 0


@pytest.mark.parametrize("make", [lambda x: 0.0, lambda x: x.numpy(), lambda x: (x, x), lambda x: [x], lambda x: True])
def test_hooks_that_return_something_else_than_a_tensor_are_refused(make: Any) -> None:
    model, tokens = small_model(), small_tokens()
    with torch.no_grad(), pytest.raises(TypeError, match=r"the hook at blocks\.1\.hook_resid_post@1 returned a .*: "
                                                         r"return a tensor to replace the activation, or None to"):
        model.run_with_hooks(tokens, 2, fwd_hooks=[("blocks.1.hook_resid_post@1", lambda x, hook: make(x))])
    assert attached(model) == 0


@pytest.mark.parametrize(("site", "make"), [
    ("blocks.1.hook_resid_post@1", lambda x: x[:1]), ("blocks.1.hook_mlp_out@1", lambda x: x.mean(1, keepdim=True)),
    ("blocks.1.hook_attn_out@1", lambda x: x.mean()), ("blocks.1.attn.hook_pattern@1", lambda x: x[:, :1]),
    ("blocks.1.hook_resid_mid@1", lambda x: x[0, 0]), ("hook_embed", lambda x: x[None]),
    ("blocks.1.ln1.hook_scale@1", lambda x: x[..., 0, :]),
])
def test_hooks_that_return_another_shape_are_refused_even_where_it_would_run_on(site: str, make: Any) -> None:
    model, tokens = small_model(), small_tokens()
    name = re.escape(site)
    with torch.no_grad(), pytest.raises(ValueError, match=rf"the hook at {name} returned shape \(.*\), the activation "
                                                          r"there has shape \(3, .*: return the same shape"):
        model.run_with_hooks(tokens, 2, fwd_hooks=[(site, lambda x, hook: make(x))])


@pytest.mark.parametrize("make", [lambda x: x.double(), lambda x: x > 0, lambda x: x.bfloat16()])
def test_hooks_that_return_another_dtype_are_refused(make: Any) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=r"the hook at blocks\.3\.hook_resid_post returned torch\..* "
                                                          r"on cpu, .* torch\.float32 on cpu: return value\.to\("):
        small_model().run_with_hooks(small_tokens(), 2,
                                     fwd_hooks=[("blocks.3.hook_resid_post", lambda x, hook: make(x))])


def test_backward_hooks_that_cannot_work_are_refused() -> None:
    model, tokens = small_model(), small_tokens()
    with pytest.raises(ValueError, match=r"use `with model.hooks\(bwd_hooks=...\)` around forward and backward"):
        model.run_with_hooks(tokens, bwd_hooks=[("hook_embed", lambda g, hook: None)])
    with (torch.no_grad(), model.hooks(bwd_hooks=[("hook_embed", lambda g, hook: None)]),
          pytest.raises(RuntimeError, match="no gradient reaches hook_embed: run the forward with gradients enabled")):
        model(tokens)


def test_hooks_on_gradients_are_held_to_the_same() -> None:
    model, tokens = small_model(), small_tokens()
    for make, kind in ((lambda g: g[:1], ValueError), (lambda g: 0.0, TypeError), (lambda g: g.double(), ValueError)):
        with (model.hooks(bwd_hooks=[("blocks.1.hook_resid_post@1", lambda g, hook, make=make: make(g))], n_loops=2),
              pytest.raises(kind, match=r"the hook at blocks\.1\.hook_resid_post@1 \(gradient\) returned")):
            model(tokens, 2)[..., :MASK].sum().backward()


def test_a_copy_has_no_hooks_and_no_edits() -> None:
    model, tokens = small_model(), small_tokens()
    copies: list[HookedLoopMDM] = []
    with torch.no_grad():
        plain = model(tokens, 3)
        hooks = [("blocks.1.hook_resid_post", lambda x, hook: x * 2), skip_loop(1),
                 ("hook_embed", lambda x, hook: copies.append(copy.deepcopy(model)) if not copies else None)]
        with model.hooks(hooks, n_loops=3):
            copies += [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
            edited = model(tokens, 3)
            for twin in copies:
                assert torch.equal(twin(tokens, 3), plain)
            assert torch.equal(model(tokens, 3), edited)
        assert not torch.allclose(edited, plain)
        for twin in copies:
            assert attached(twin) == 0
            assert twin.replans == ()
            with edit(twin, [steer("hook_embed", torch.ones(16))], n_loops=3):
                assert not torch.allclose(twin(tokens, 3), plain)
            assert torch.equal(twin(tokens, 3), plain)


def test_a_recording_by_regular_expression() -> None:
    model, tokens = small_model(), small_tokens()
    _, rec = model.run_with_cache(tokens, 2, names_filter=re.compile(r"resid_(pre|post)$"))
    _, same = model.run_with_cache(tokens, 2, names_filter=["**.hook_resid_pre", "**.hook_resid_post"])
    assert list(rec) == list(same)
    fired: list[str] = []
    model.run_with_hooks(tokens, 2, fwd_hooks=[(re.compile(r"^blocks\.2\.hook_mlp"), lambda x, hook: fired.append(
        hook.site))])
    assert fired == ["blocks.2.hook_mlp_out@0", "blocks.2.hook_mlp_out@1"]


def test_nested_contexts_undo_only_their_own_hooks() -> None:
    model, tokens = small_model(), small_tokens()
    with torch.no_grad():
        plain = model(tokens, 2)
        with model.hooks([("hook_embed", lambda x, hook: x + 1)], n_loops=2):
            outer = model(tokens, 2)
            with model.hooks([("hook_embed", lambda x, hook: x - 1)], n_loops=2):
                torch.testing.assert_close(model(tokens, 2), plain, atol=1e-4, rtol=1e-4)
            assert torch.equal(model(tokens, 2), outer)
        assert torch.equal(model(tokens, 2), plain)
    assert not torch.allclose(outer, plain)


def test_add_hook_and_reset_hooks() -> None:
    model, tokens = small_model(), small_tokens()
    fired: list[str] = []
    remove = model.add_hook("blocks.1.hook_resid_post@-1", lambda x, hook: fired.append(hook.site), n_loops=3)
    model(tokens, 3)
    model(tokens, 3)
    assert fired == ["blocks.1.hook_resid_post@2"] * 2
    remove()
    assert attached(model) == 0
    model.add_hook("**", lambda x, hook: fired.append(hook.site))
    model.reset_hooks()
    model(tokens)
    assert len(fired) == 2


# ------------------------------------------------------------------------ threads


def test_two_threads_do_not_see_each_others_hooks() -> None:
    model = small_model()
    mine, theirs = small_tokens(seed=1), small_tokens(seed=2)
    with torch.no_grad():
        expected = {3: model(mine, 3), 5: model(theirs, 5)}
        states = {n: model.run_with_cache(tokens, n, names_filter="blocks.2.hook_resid_post")[1].stack(
            "blocks.2.hook_resid_post") for n, tokens in ((3, mine), (5, theirs))}
    problems: list[str] = []
    start = threading.Barrier(3)

    def check(good: bool, what: str) -> None:
        if not good:
            problems.append(what)

    def guarded(body: Any) -> threading.Thread:
        def run() -> None:
            start.wait()
            try:
                with torch.no_grad():
                    for _ in range(30):
                        body()
            except Exception as error:  # reported by the test's own thread
                problems.append(repr(error))
        return threading.Thread(target=run)

    def unhooked() -> None:
        check(torch.equal(model(mine, 3), expected[3]), "the unhooked forward saw a hook")

    def recording() -> None:
        logits, rec = model.run_with_cache(theirs, 5, names_filter="blocks.2.hook_resid_post")
        check(torch.equal(logits, expected[5]), "the recorded forward was edited")
        check(torch.equal(rec.stack("blocks.2.hook_resid_post"), states[5]), "loops were mixed up")

    def editing() -> None:
        with model.hooks([("blocks.*.hook_resid_post", lambda x, hook: x * 0)], n_loops=3):
            out = [model(mine, 3), model(mine, 3)]
        check(torch.equal(out[0], out[1]), "an edited forward lost its hooks")
        check(not torch.equal(out[0], expected[3]), "an edited forward was not edited")

    threads = [guarded(body) for body in (unhooked, recording, editing)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems, problems[:3]
    assert attached(model) == 0
