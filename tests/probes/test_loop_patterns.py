"""Distances of attention patterns over loops and layers, and answers with the patterns of an earlier loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM
from probes.cycles import own_loops, pseudo_loops
from probes.loop_patterns import frozen_attention, head_distances, pattern_gram
from tests.small import small_config, small_model, small_tokens, uniform_attention


def test_cycles_name_the_layers_that_run():
    loop = own_loops(small_config(n_loop_layers=2).topology(3))
    assert loop.depths == ((1, 2), (3, 4), (5, 6))
    assert loop.sites("hook_resid_post")[3] == "blocks.2.hook_resid_post@1"
    deep = small_config(n_loop_layers=5, max_loops=1)
    assert pseudo_loops(deep.topology(1), 2).depths == ((1, 2), (3, 4))
    assert pseudo_loops(deep.topology(1), 2, offset=1).depths == ((2, 3), (4, 5))
    with pytest.raises(ValueError, match="the control needs at least two"):
        pseudo_loops(deep.topology(1), 3)


def test_gram_and_distances_equal_a_naive_computation():
    model, noised = small_model(), small_tokens(3)
    cycle = own_loops(model.topology(2))
    gram = pattern_gram(model, noised, cycle, chunk=2)
    _, rec = model.run_with_cache(noised, 2, names_filter="blocks.*.attn.hook_pattern")
    a, b = rec["blocks.1.attn.hook_pattern@0"][2, 1], rec["blocks.2.attn.hook_pattern@1"][2, 0]
    where = np.flatnonzero((gram.loop_a == 0) & (gram.layer_a == 0) & (gram.head_a == 1))[0]
    other = np.flatnonzero((gram.loop_b == 1) & (gram.layer_b == 1) & (gram.head_b == 0))[0]
    assert gram.values[2, where, other] == pytest.approx((a * b).sum().item(), rel=1e-5)
    distances = head_distances(gram)
    p, q = rec["blocks.1.attn.hook_pattern@0"], rec["blocks.2.attn.hook_pattern@1"]

    def naive(order: tuple[int, int]) -> torch.Tensor:
        d = [(p[:, h] - q[:, o]).flatten(1).norm(dim=1)
             / (p[:, h].flatten(1).norm(dim=1) ** 2 + q[:, o].flatten(1).norm(dim=1) ** 2).sqrt()
             for h, o in enumerate(order)]
        return torch.stack(d).mean(0)

    best = min((naive((0, 1)), naive((1, 0))), key=lambda d: d.mean().item())
    np.testing.assert_allclose(distances.values[:, 0, 3], best.numpy(), rtol=1e-4)


def ratio(model, noised, cycle):
    """Mean distance of the same layer in two loops, and of two layers, after all heads are matched."""
    distances = head_distances(pattern_gram(model, noised, cycle))
    same = distances.layer.values[:, None] == distances.layer_q.values[None]
    other_loop = distances.loop.values[:, None] != distances.loop_q.values[None]
    return distances.values[:, same & other_loop], distances.values[:, ~same]


def test_a_model_that_repeats_exactly_has_no_distance_and_shuffled_layers_all_have_the_same():
    model, noised = small_model(), small_tokens(8)
    # H never moves: with the outputs of the mid layers silenced, every loop sees the same state
    for block in model.blocks[1:3]:
        block.attn.out.weight.data.zero_()
        block.mlp.down.weight.data.zero_()
        block.mlp.down.bias.data.zero_()
    same, other = ratio(model, noised, own_loops(model.topology(4)))
    assert same.max() == 0, "what is rounding alone counts as nothing"
    assert other.min() > 0.01
    deep = small_model(n_loop_layers=8, max_loops=1)
    same, other = ratio(deep, noised, pseudo_loops(deep.topology(1), 2))
    assert same.mean() / other.mean() == pytest.approx(1, abs=0.25)


def test_the_same_layer_is_alike_over_loops_without_any_training():
    """Why distances are no test of repetition: nothing was learned here, and the unshared layers have a ratio of 1."""
    for seed in range(4):
        model = small_model(seed)
        same, other = ratio(model, small_tokens(8), own_loops(model.topology(4)))
        assert same.mean() / other.mean() < 0.9


def test_uniform_attention_differs_nowhere():
    nearly = small_model(qk_norm=False)   # scores of about 1e-6, which softmax rounds
    for block in nearly.blocks:
        block.attn.qkv.weight.data[:2 * nearly.config.d_model] *= 1e-3
    for model in (nearly, uniform_attention(small_model())):
        distances = head_distances(pattern_gram(model, small_tokens(6), own_loops(model.topology(3))))
        assert (distances.values == 0).all()


def test_freezing_after_the_last_loop_is_the_model_itself_and_earlier_is_not():
    model, noised = small_model(2, vocab_size=40), small_tokens(8)   # many tokens: answers change easily
    model.unembed_bias.data.zero_()
    cycle = own_loops(model.topology(3))
    logits = model(noised, 3)
    assert torch.equal(frozen_attention(model, noised, cycle, after=2), logits.argmax(-1))
    changed = frozen_attention(model, noised, cycle, after=0)
    assert not torch.equal(changed, logits.argmax(-1))


def frozen_by_hand(model: HookedLoopMDM, noised: Tensor, n_loops: int, after: int, t: float | None = None) -> Tensor:
    """Answers with every looped layer's pattern after loop ``after`` replaced by the one that it had there."""
    sites = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in (1, 2)}
    _, rec = model.run_with_cache(noised, n_loops, t=t)
    edits = [(f"{site}@{k}", lambda x, hook, kept=rec[f"{site}@{after}"]: kept)
             for site in sites.values() for k in range(after + 1, n_loops)]
    return model.run_with_hooks(noised, n_loops, fwd_hooks=edits, t=t).argmax(-1)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_frozen_attention_keeps_the_patterns_of_the_loop_it_names(after: int) -> None:
    model = small_model(2, vocab_size=40)
    model.unembed_bias.data.zero_()
    noised = torch.randint(0, 40, (16, 10), generator=torch.Generator().manual_seed(1))
    cycle = own_loops(model.topology(4))
    expected = {k: frozen_by_hand(model, noised, 4, k) for k in range(4)}
    assert all(not torch.equal(expected[k], expected[after]) for k in range(4) if k != after)
    assert torch.equal(frozen_attention(model, noised, cycle, after=after), expected[after])
