"""Controls by surgery: what they compute is what they are made from, and what they are planted with is found."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hooks import LoopedModel
from probes import stage_test
from probes.cycles import own_loops, pseudo_loops
from probes.exchange import exchange, tau
from probes.thresholds import THRESHOLDS
from studies.questions.controls import (
    SHAPES,
    counter,
    far_loops,
    gated_copy,
    mixture,
    per_loop_attention,
    per_loop_mlp,
    retrained,
    task_batches,
    unrolled_copy,
    untrained,
)
from studies.questions.controls.operations import majority, rule_30
from studies.questions.controls.switched import own_gate
from studies.tasks import Automaton
from tests.small import MASK, small_model, small_tokens

VARIANTS = {
    "plain": {}, "injection": {"input_injection": "add"}, "head injection": {"input_injection": "head"},
    "layernorm, swiglu": {"norm": "layer", "mlp": "swiglu"}, "no qk-norm": {"qk_norm": False},
    "learned positions": {"position": "learned"}, "loop embedding": {"loop_embedding": "learned"},
    "nothing around": {"n_head_layers": 0, "n_tail_layers": 0}, "tied": {"tie_embeddings": True},
}


def matrices(model, cycle, tokens):
    return [tau(exchange(model, tokens, cycle, maps=maps)).values for maps in ("loop", "layer")]


# ---------------------------------------------------------------- gated copy

@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_gated_copy_computes_what_its_twin_computes(changes):
    twin = small_model(seed=1, n_loop_layers=5, max_loops=1, **changes)
    made = gated_copy(twin, 2)
    tokens = small_tokens(4)
    assert made.max_loops == 2
    assert made.topology().n_mid == 2
    torch.testing.assert_close(made(tokens), twin(tokens), atol=1e-5, rtol=1e-5)
    state, context = made.enter(tokens)
    torch.testing.assert_close(made.resume(0, state, context), twin(tokens), atol=1e-5, rtol=1e-5)


def test_a_gated_copy_gets_the_matrices_of_its_twin():
    twin = small_model(seed=2, n_loop_layers=7, max_loops=1)
    made, tokens = gated_copy(twin, 2), small_tokens(12)
    for one, other in zip(matrices(made, own_loops(made.topology()), tokens),
                          matrices(twin, pseudo_loops(twin.topology(), 2), tokens), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_the_stage_test_says_the_same_of_what_computes_the_same():
    quick = replace(THRESHOLDS, resamples=500)
    twin = small_model(seed=2, n_loop_layers=4, max_loops=1, n_head_layers=0, n_tail_layers=0)
    loop = small_model(seed=4, n_loop_layers=1, max_loops=3)
    tokens = small_tokens(12)
    clean = torch.randint(0, MASK, tokens.shape, generator=torch.Generator().manual_seed(1))
    for one, other, period, n_loops in ((gated_copy(twin, 2), twin, 2, 2), (loop, unrolled_copy(loop), 1, 3)):
        looped = stage_test(one, tokens, targets=clean, n_loops=n_loops, thresholds=quick)
        unlooped = stage_test(other, tokens, targets=clean, layers_per_loop=period, thresholds=quick)
        np.testing.assert_allclose(looped.tau, unlooped.tau, atol=1e-4)
        np.testing.assert_allclose(looped.stages, unlooped.stages, atol=1e-4)
        assert (looped.regime, looped.letters) == (unlooped.regime, unlooped.letters)


def test_a_leak_makes_the_loops_one_operation():
    twin = small_model(seed=3, n_loop_layers=4, max_loops=1)
    made = gated_copy(twin, 2, leak=1.0)
    state, context = made.enter(small_tokens(3))
    one, other = (made.walk(state, context, 1 + 2 * k, 3 + 2 * k) for k in range(2))
    torch.testing.assert_close(one, other)
    none = gated_copy(twin, 2)
    one, other = (none.walk(state, none.enter(small_tokens(3))[1], 1 + 2 * k, 3 + 2 * k) for k in range(2))
    assert (one - other).detach().abs().max() > 0.1
    torch.testing.assert_close(own_gate(4, 0.4).sum(1), torch.ones(4))
    with pytest.raises(ValueError, match="leak is a share"):
        gated_copy(twin, 2, leak=1.5)


def test_a_gated_copy_is_recorded_at_its_own_sites():
    twin = small_model(seed=3, n_loop_layers=4, max_loops=1)
    made, tokens = gated_copy(twin, 2), small_tokens(3)
    _, rec = made.run_with_cache(tokens, names_filter="blocks.*.attn.hook_pattern")
    _, of_twin = twin.run_with_cache(tokens, 1, names_filter="blocks.*.attn.hook_pattern")
    torch.testing.assert_close(rec["blocks.2.attn.hook_pattern@1"], of_twin["blocks.4.attn.hook_pattern@0"],
                               atol=1e-5, rtol=1e-5)


def test_what_cannot_be_gated_is_refused():
    with pytest.raises(ValueError, match="loops \\(max_loops 4\\)"):
        gated_copy(small_model(n_loop_layers=4))
    with pytest.raises(ValueError, match="at least two"):
        gated_copy(small_model(n_loop_layers=3, max_loops=1), 2)
    with pytest.raises(ValueError, match="conditioned on time"):
        gated_copy(small_model(n_loop_layers=4, max_loops=1, time_conditioning="t"), 2)
    made = gated_copy(small_model(n_loop_layers=4, max_loops=1), 2)
    with pytest.raises(ValueError, match="no weights of its own"):
        made(small_tokens(2), 3)


# -------------------------------------------------------------- unrolled copy

@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_loop_in_disguise_computes_what_the_loop_computes(changes):
    loop = small_model(seed=4, max_loops=3, **changes)
    made, tokens = unrolled_copy(loop, 4), small_tokens(4)
    assert made.max_loops == 1
    torch.testing.assert_close(made(tokens), loop(tokens, 4), atol=1e-5, rtol=1e-5)
    state, context = made.enter(tokens)
    torch.testing.assert_close(made.resume(0, state, context), loop(tokens, 4), atol=1e-5, rtol=1e-5)


def test_a_loop_in_disguise_gets_the_matrices_of_the_loop():
    loop = small_model(seed=5, max_loops=3, input_injection="add")
    made, tokens = unrolled_copy(loop), small_tokens(12)
    for one, other in zip(matrices(loop, own_loops(loop.topology()), tokens),
                          matrices(made, pseudo_loops(made.topology(), 2), tokens), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


# ------------------------------------------------------------------- per loop

@pytest.mark.parametrize("surgery", [per_loop_mlp, per_loop_attention])
@pytest.mark.parametrize("changes", [{}, {"mlp": "swiglu", "n_loop_layers": 1}])
def test_a_share_of_the_weights_is_each_loops_own(surgery, changes):
    model, tokens = small_model(seed=6, **changes), small_tokens(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    none = surgery(model, share=0.0)
    torch.testing.assert_close(none(tokens), model(tokens))
    distances = []
    for share in (0.5, 1.0):
        made = surgery(model, 3, share=share, seed=1)
        state, context = made.enter(tokens, 3)
        n_mid = made.topology(3).n_mid
        ends = [made.walk(state, context, 1 + n_mid * k, 1 + n_mid * (k + 1)) for k in range(3)]
        distances.append((ends[0] - ends[1]).detach().norm() + (ends[1] - ends[2]).detach().norm())
        with pytest.raises(ValueError, match="no weights of its own"):
            made(tokens, 4)
    assert 0.1 < distances[0] < distances[1]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="share is the part"):
        surgery(model, share=2.0)


def test_narrow_parts_add_up_to_the_whole():
    from studies.questions.controls.per_loop import _narrowed

    block, x = small_model(seed=7).blocks[1], torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    model = small_model(seed=7)
    parts = [_narrowed(block.attn, torch.tensor([unit])) for unit in range(2)]
    torch.testing.assert_close(sum(part(x, model.rotary(9)) for part in parts), block.attn(x, model.rotary(9)),
                               atol=1e-5, rtol=1e-5)
    halves = [_narrowed(block.mlp, torch.arange(24)[half::2]) for half in range(2)]
    torch.testing.assert_close(sum(part(x) for part in halves) - block.mlp.down.bias, block.mlp(x), atol=1e-5,
                               rtol=1e-5)


def test_retraining_lowers_the_loss_and_is_repeatable():
    task = Automaton(rule=90, width=4, rows=3)
    model = small_model(seed=8, vocab_size=3, mask_token_id=2, max_seq_len=12)
    made = [per_loop_mlp(model, 2, batches=task_batches(task, batch_size=16), steps=20) for _ in range(2)]
    tokens = task.sample(32, seed=1, split="test").tokens
    noised = tokens.masked_fill(torch.arange(12) % 2 == 1, 2)

    @torch.no_grad()
    def loss(one):
        return float(torch.nn.functional.cross_entropy(one(noised, 2)[:, 1::2].flatten(0, 1),
                                                       tokens[:, 1::2].flatten()))

    assert loss(made[0]) == loss(made[1])
    assert loss(made[0]) < loss(per_loop_mlp(model, 2)) - 0.03
    assert retrained(model, task_batches(task, batch_size=4), steps=1, n_loops=2) is model


# -------------------------------------------------------------------- others

def test_a_counter_is_told_its_loop():
    model, tokens = small_model(seed=9), small_tokens(3)
    still = counter(model, scale=0.0)
    torch.testing.assert_close(still(tokens), model(tokens))
    loud = counter(model, 3, scale=30.0, seed=1)
    state, context = loud.enter(tokens, 3)
    ends = [loud.walk(state, context, 1 + 2 * k, 3 + 2 * k) for k in range(3)]
    assert (ends[0] - ends[1]).detach().norm(dim=-1).mean() > 30
    assert far_loops(loud) == (6, 10)
    assert far_loops(model, 2) == (8, 10)


@pytest.mark.parametrize("shape", SHAPES)
def test_untrained_models_meet_the_contract(shape):
    task = Automaton(rule=30, width=4, rows=3)
    model = untrained(shape, 3, task=task)
    assert isinstance(model, LoopedModel)
    assert model.max_loops == 4
    tokens = task.sample(5, seed=0).tokens.masked_fill(task.regions() > 0, task.mask_token_id)
    with torch.no_grad():
        logits = model(tokens)
        state, context = model.enter(tokens)
        torch.testing.assert_close(model.resume(0, state, context), logits, atol=1e-5, rtol=1e-4)
        assert torch.equal(untrained(shape, 3, task=task)(tokens), logits)
        assert not torch.equal(untrained(shape, 4, task=task)(tokens), logits)
    assert float(logits[..., :2].std()) > 0.05


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match="no shape is called"):
        untrained("flat", task=Automaton(width=4, rows=3))


def test_a_mixture_goes_from_one_operation_to_the_other():
    bits = torch.randint(0, 2, (50, 8), generator=torch.Generator().manual_seed(0))
    assert torch.equal(mixture(rule_30, majority, 0.0)(bits), rule_30(bits))
    assert torch.equal(mixture(rule_30, majority, 1.0)(bits), majority(bits))
    half = mixture(rule_30, majority, 0.5)(bits)
    assert torch.equal(half[:, :4], majority(bits)[:, :4])
    assert torch.equal(half[:, 4:], rule_30(bits)[:, 4:])
    with pytest.raises(ValueError, match="share is a part"):
        mixture(rule_30, majority, 1.1)
    assert MASK == 6
