"""The stage test: it must call a repetition a repetition, and noise noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import f_oneway
from torch import Tensor

from hooks import HookedLoopMDM
from probes import stages
from probes.cycles import own_loops, pseudo_loops
from probes.intervals import NotDefinedError
from tests.small import MASK, small_config, small_model, small_tokens, uniform_attention


def tokens_and_truth(n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    noised = small_tokens(n)
    truth = torch.where(noised == MASK, torch.zeros_like(noised), noised)
    return noised, truth


def test_cycles_name_the_layers_that_run():
    loop = own_loops(small_config(n_loop_layers=2).topology(3))
    assert loop.depths == ((1, 2), (3, 4), (5, 6))
    assert loop.sites("hook_resid_post")[3] == "blocks.2.hook_resid_post@1"
    deep = small_config(n_loop_layers=5, max_loops=1)
    assert pseudo_loops(deep.topology(1), 2).depths == ((1, 2), (3, 4))
    assert pseudo_loops(deep.topology(1), 2, offset=1).depths == ((2, 3), (4, 5))
    with pytest.raises(ValueError, match="the control needs at least two"):
        pseudo_loops(deep.topology(1), 3)


def test_signature_equals_the_definitions_computed_by_hand():
    model, (noised, truth) = small_model(), tokens_and_truth(3)
    cycle = own_loops(model.topology(2))
    array = stages.signature(model, noised, truth, cycle, chunk=2)
    _, rec = model.run_with_cache(noised, 2)
    example, k, layer = 1, 1, 2
    masked = noised[example] == MASK
    pre, post = (rec[f"blocks.{layer}.hook_resid_{w}@{k}"][example] for w in ("pre", "post"))
    pattern = rec[f"blocks.{layer}.attn.hook_pattern@{k}"][example]
    entropy = torch.distributions.Categorical(probs=pattern).entropy()
    nll = [torch.nn.functional.cross_entropy(model.unembed(x[None])[0][masked], truth[example][masked])
           for x in (pre, post)]
    attention, mlp = (rec[f"blocks.{layer}.hook_{w}_out@{k}"][example][masked].norm(dim=-1) for w in ("attn", "mlp"))
    expected = {
        "update": ((post - pre).norm(dim=-1) / pre.norm(dim=-1))[masked].mean(),
        "attention_share": (attention / (attention + mlp)).mean(),
        "attention_entropy": entropy[:, masked].mean(),
        "flow_masked_masked": pattern[:, masked][:, :, masked].sum(-1).mean(),
        "flow_visible_masked": pattern[:, ~masked][:, :, masked].sum(-1).mean(),
        "lens_entropy": torch.distributions.Categorical(logits=model.unembed(post[None])[0]).entropy()[masked].mean(),
        "lens_gain": nll[0] - nll[1],
    }
    got = array.isel(example=example, loop=k, layer=1)
    for name, value in expected.items():
        assert float(got.sel(feature=name)) == pytest.approx(value.item(), rel=1e-4), name
    assert 1 <= float(got.sel(feature="effective_rank")) <= 9


def test_variance_partition_sums_to_one_and_finds_what_was_planted():
    rng = np.random.default_rng(0)
    layer = np.broadcast_to(rng.normal(size=(1, 3, 5)), (6, 3, 5))
    loop = np.broadcast_to(rng.normal(size=(6, 1, 5)), (6, 3, 5))
    assert stages.variance_partition(layer)["layer"] == pytest.approx(1)
    assert stages.variance_partition(loop)["loop"] == pytest.approx(1)
    mixed = stages.variance_partition(layer + loop + rng.normal(size=(6, 3, 5)))
    assert sum(mixed.values()) == pytest.approx(1)
    assert all(0 < share < 1 for share in mixed.values())


def test_variance_shares_agree_with_a_one_way_anova():
    values = np.random.default_rng(1).normal(size=(7, 3, 1))
    share = stages.variance_partition(values)["layer"]
    f = f_oneway(*values[:, :, 0].T).statistic   # F = (share / (L−1)) / ((1 − share) / (N − L))
    assert (share / 2) / ((1 - share) / 18) == pytest.approx(f)


def test_profile_correlation_is_one_for_rescaled_profiles_and_near_zero_for_noise():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 200))
    assert stages.profile_correlation(a, 3 * a + rng.normal(size=(1, 200))) == pytest.approx(1)
    assert abs(stages.profile_correlation(a, rng.normal(size=(5, 200)))) < 0.1


def test_gram_and_distances_equal_a_naive_computation():
    model, (noised, _) = small_model(), tokens_and_truth(3)
    cycle = own_loops(model.topology(2))
    gram = stages.pattern_gram(model, noised, cycle, chunk=2)
    _, rec = model.run_with_cache(noised, 2, names_filter="blocks.*.attn.hook_pattern")
    a, b = rec["blocks.1.attn.hook_pattern@0"][2, 1], rec["blocks.2.attn.hook_pattern@1"][2, 0]
    where = np.flatnonzero((gram.loop_a == 0) & (gram.layer_a == 0) & (gram.head_a == 1))[0]
    other = np.flatnonzero((gram.loop_b == 1) & (gram.layer_b == 1) & (gram.head_b == 0))[0]
    assert gram.values[2, where, other] == pytest.approx((a * b).sum().item(), rel=1e-5)
    distances = stages.head_distances(gram)
    p, q = rec["blocks.1.attn.hook_pattern@0"], rec["blocks.2.attn.hook_pattern@1"]

    def naive(order: tuple[int, int]) -> torch.Tensor:
        d = [(p[:, h] - q[:, o]).flatten(1).norm(dim=1)
             / (p[:, h].flatten(1).norm(dim=1) ** 2 + q[:, o].flatten(1).norm(dim=1) ** 2).sqrt()
             for h, o in enumerate(order)]
        return torch.stack(d).mean(0)

    best = min((naive((0, 1)), naive((1, 0))), key=lambda d: d.mean().item())
    np.testing.assert_allclose(distances.values[:, 0, 3], best.numpy(), rtol=1e-4)


def test_a_model_that_repeats_exactly_has_ratio_zero_and_shuffled_layers_ratio_one():
    model, (noised, _) = small_model(), tokens_and_truth(8)
    # H never moves: with the outputs of the mid layers silenced, every loop sees the same state
    for block in model.blocks[1:3]:
        block.attn.out.weight.data.zero_()
        block.mlp.down.weight.data.zero_()
        block.mlp.down.bias.data.zero_()
    distances = stages.head_distances(stages.pattern_gram(model, noised, own_loops(model.topology(4))))
    assert stages.same_layer_distance(distances).max() == 0, "what is rounding alone counts as nothing"
    assert stages.other_layer_distance(distances).min() > 0.01
    deep = small_model(n_loop_layers=8, max_loops=1)
    distances = stages.head_distances(stages.pattern_gram(deep, noised, pseudo_loops(deep.topology(1), 2)))
    same, other = stages.same_layer_distance(distances), stages.other_layer_distance(distances)
    assert stages.distance_ratio(same.mean(), other.mean()) == pytest.approx(1, abs=0.25)


def test_a_low_ratio_of_distances_comes_with_shared_weights_untrained():
    """Why the ratio is no test of repetition: nothing was learned here, and the unshared layers have 1."""
    noised = small_tokens(8)
    for seed in range(4):
        model = small_model(seed)
        distances = stages.head_distances(stages.pattern_gram(model, noised, own_loops(model.topology(4))))
        same, other = stages.same_layer_distance(distances), stages.other_layer_distance(distances)
        assert stages.distance_ratio(same.mean(), other.mean()) < 0.9


def test_one_loop_one_layer_and_uniform_attention_are_said_to_have_no_ratio():
    noised = small_tokens(6)
    model = small_model()
    one_loop = stages.head_distances(stages.pattern_gram(model, noised, own_loops(model.topology(1))))
    with pytest.raises(NotDefinedError, match="one loop only"):
        stages.same_layer_distance(one_loop)
    one_layer = small_model(n_loop_layers=1)
    distances = stages.head_distances(stages.pattern_gram(one_layer, noised, own_loops(one_layer.topology(3))))
    assert (stages.same_layer_distance(distances) > 0).all(), "defined all the same"
    with pytest.raises(NotDefinedError, match="no other layer"):
        stages.other_layer_distance(distances)
    nearly = small_model(qk_norm=False)   # scores of about 1e-6, which softmax rounds
    for block in nearly.blocks:
        block.attn.qkv.weight.data[:2 * nearly.config.d_model] *= 1e-3
    even = uniform_attention(small_model())
    for model in (nearly, even):
        distances = stages.head_distances(stages.pattern_gram(model, noised, own_loops(model.topology(3))))
        assert (distances.values == 0).all()
    with pytest.raises(NotDefinedError, match="do not differ"):
        stages.distance_ratio(stages.same_layer_distance(distances).mean(),
                              stages.other_layer_distance(distances).mean())


def test_variance_and_correlation_of_what_does_not_vary_have_no_value():
    rng = np.random.default_rng(0)
    varying = rng.normal(size=(4, 3, 5))
    with pytest.raises(NotDefinedError, match="one layer only"):
        stages.variance_partition(varying[:, :1])
    with pytest.raises(NotDefinedError, match="one loop only"):
        stages.variance_partition(varying[:1])
    rounding = 3 + 1e-7 * varying
    with pytest.raises(NotDefinedError, match="no feature"):
        stages.variance_partition(rounding)
    with pytest.raises(NotDefinedError, match="no feature"):
        stages.variance_partition(np.full((4, 3, 5), np.nan))
    with pytest.raises(NotDefinedError, match="no feature"):
        stages.profile_correlation(varying[0], rounding[0])
    mixed = np.concatenate([varying, rounding], axis=-1)
    assert stages.variance_partition(mixed) == stages.variance_partition(varying), "rounding has no say"


def test_a_feature_that_some_examples_lack_is_averaged_over_the_others():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
    np.testing.assert_array_equal(stages.example_mean(values), [2, np.nan])


def test_freezing_after_the_last_loop_is_the_model_itself_and_earlier_is_not():
    model, noised = small_model(2, vocab_size=40), small_tokens(8)   # many tokens: answers change easily
    model.unembed_bias.data.zero_()
    cycle = own_loops(model.topology(3))
    logits = model(noised, 3)
    assert torch.equal(stages.frozen_attention(model, noised, cycle, after=2), logits.argmax(-1))
    changed = stages.frozen_attention(model, noised, cycle, after=0)
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
    assert torch.equal(stages.frozen_attention(model, noised, cycle, after=after), expected[after])
