"""TransformerLens' own tools run on the unrolled bridge; its caches and our recordings map to each other."""

from __future__ import annotations

import pytest
import torch
from transformer_lens import ActivationCache, patching
from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch
from transformer_lens.tools.analysis.logit_lens import logit_lens

from hooks.bridges.interop import depth_site, entered_resid, to_depth, to_sites
from hooks.sites import SiteError
from tests.small import VARIANTS, small_tokens
from tests.small_unrolled import BY_EXAMPLE, LOOPS, build, close, visible


@pytest.fixture(params=list(VARIANTS))
def variant(request):
    return request.param


# ---------------------------------------------------------------- ActivationCache

def test_decompositions_sum_to_the_residual_stream(variant):
    model, bridge, tokens, _ = build(variant)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        final = cache["resid_post", -1]
        close(cache.decompose_resid().sum(0) + entered_resid(cache), final)
        heads, labels = cache.stack_head_results(return_labels=True, incl_remainder=True)
        assert len(labels) == bridge.cfg.n_layers * bridge.cfg.n_heads + 1
        close(heads.sum(0), final)
        attn = cache.decompose_resid(mode="attn", incl_embeds=False)
        close(heads[:-1].view(*attn.shape[:1], -1, *attn.shape[1:]).sum(1), attn)
        full = cache.get_full_resid_decomposition(expand_neurons=True)
        close(full.sum(0) + entered_resid(cache), final)
        stream = cache.accumulated_resid()
        close(stream[-1], final)
    layers = model.config.topology(LOOPS)
    _, rec = model.run_with_cache(tokens, LOOPS, t=0.4 if variant in BY_EXAMPLE else None)
    close(stream[1 + layers.n_head], rec[layers.site_at(layers.n_head + 1, "hook_resid_pre")])


def test_the_last_lens_entry_is_the_models_own_output(variant):
    _, bridge, tokens, logits = build(variant)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        by_hand = cache.accumulated_resid(apply_ln=True) @ bridge.W_U + bridge.b_U
        lens = logit_lens(bridge, tokens, return_type="logits", positions=None)
    close(visible(by_hand[-1]), visible(logits))
    close(visible(lens.values[-1]), visible(logits))
    close(visible(lens.values), visible(by_hand[-len(lens.values):]))


def test_logit_attributions_sum_to_the_logit_difference(variant):
    """Without weight processing, since W_U holds the final norm's scale."""
    _, bridge, tokens, logits = build(variant)
    right, wrong = torch.full_like(tokens, 2), torch.full_like(tokens, 4)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        parts = cache.logit_attrs(cache.decompose_resid(), right, wrong).sum(0)
        entered = entered_resid(cache)
        if isinstance(entered, torch.Tensor):
            parts = parts + cache.logit_attrs(entered[None], right, wrong)[0]
        bias = bridge.b_U[2] - bridge.b_U[4]
    close(parts + bias, logits[..., 2] - logits[..., 4])


# ---------------------------------------------------------------- patching

def metric(logits):
    return (logits[:, :, 2] - logits[:, :, 4]).sum()


def test_activation_patching_equals_patching_by_site():
    model, bridge, clean, _ = build("plain")
    clean, corrupt = clean[:1, :5], small_tokens(seed=1)[:1, :5]
    topology = model.config.topology(LOOPS)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        _, rec = model.run_with_cache(clean, LOOPS)
        for sweep, hook in ((patching.get_act_patch_resid_pre, "hook_resid_pre"),
                            (patching.get_act_patch_resid_mid, "hook_resid_mid"),
                            (patching.get_act_patch_attn_out, "hook_attn_out"),
                            (patching.get_act_patch_mlp_out, "hook_mlp_out")):
            got = sweep(bridge, corrupt, cache, metric)
            assert got.shape == (topology.depth, 5)
            for depth in (0, 2, 5):
                site = topology.site_at(depth, hook)

                def patch(x, hook, site=site):
                    return torch.cat([x[:, :1], rec[site][:, 1:2], x[:, 2:]], 1)

                expected = metric(model.run_with_hooks(corrupt, LOOPS, fwd_hooks=[(site, patch)]))
                close(got[depth, 1], expected)
        assert float(got.std()) > 0
        every = patching.get_act_patch_attn_head_all_pos_every(bridge, corrupt, cache, metric)
        assert every.shape == (5, topology.depth, 2)
        assert bool(torch.isfinite(every).all())
        itself = patching.get_act_patch_resid_pre(bridge, clean, cache, metric)
        close(itself, torch.full_like(itself, float(metric(model(clean, LOOPS)))), atol=1e-4)


def test_direct_path_patching_and_its_fork():
    _, bridge, clean, _ = build("plain")
    clean, corrupt = clean[:1, :4], small_tokens(seed=1)[:1, :4]
    with torch.no_grad():
        _, clean_cache = bridge.run_with_cache(clean)
        logits, corrupt_cache = bridge.run_with_cache(corrupt)
        effect = patching.get_act_patch_direct_path(bridge, corrupt, clean_cache, corrupt_cache, metric, 0, 1, "v",
                                                    verbose=False)
        again = patching.get_act_patch_direct_path(bridge, corrupt, corrupt_cache, corrupt_cache, metric, 0, 1, "v",
                                                   verbose=False)
    assert float((effect[1:] - metric(logits)).abs().min()) > 1e-6
    close(again[1:], torch.full_like(again[1:], float(metric(logits))), atol=1e-4)


@pytest.mark.parametrize("name", ["plain", "layernorm", "swiglu", "time-constant"])
def test_attribution_patching_is_the_gradient_times_the_difference(name):
    model, bridge, clean, _ = build(name)
    clean, corrupt = clean[:1, :4], small_tokens(seed=1)[:1, :4]
    result = attribution_patch(bridge, clean, corrupt, metric)
    topology = model.config.topology(LOOPS)
    _, clean_rec = model.run_with_cache(clean, LOOPS, names_filter="blocks.*.hook_mlp_out")
    _, corrupt_rec = model.run_with_cache(corrupt, LOOPS, names_filter="blocks.*.hook_mlp_out", loss_fn=metric)
    scores = {(node.layer, node.position): score for node, score in result.node_scores.items()
              if node.kind == "mlp_out"}
    assert len(scores) == topology.depth * 4
    for (depth, position), score in scores.items():
        site = topology.site_at(depth, "hook_mlp_out")
        expected = ((clean_rec[site] - corrupt_rec[site]) * corrupt_rec.gradients[site])[0, position].sum()
        assert score == pytest.approx(float(expected), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("name", ["plain", "time-constant"])
def test_edge_attribution_sums_to_the_node_scores(name):
    _, bridge, clean, _ = build(name)
    clean, corrupt = clean[:1, :3], small_tokens(seed=1)[:1, :3]
    nodes = attribution_patch(bridge, clean, corrupt, metric).node_scores
    edges = attribution_patch(bridge, clean, corrupt, metric, EdgeAttributionConfig(granularity="edge"))
    assert edges.edge_scores
    for node, score in edges.node_scores.items():
        assert score == pytest.approx(nodes[node], rel=2e-3, abs=2e-4)


# ---------------------------------------------------------------- caches and recordings

def test_there_and_back():
    model, bridge, tokens, _ = build("everything")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        _, rec = model.run_with_cache(tokens, LOOPS, t=0.4)
    there = to_depth(to_sites(cache, model.config.topology(LOOPS)), bridge)
    assert isinstance(there, ActivationCache)
    for key in there:
        assert there[key] is cache[key]
    back = to_depth(rec, bridge)
    assert set(to_sites(back, model.config.topology(LOOPS))) == set(rec)
    close(back.decompose_resid().sum(0) + entered_resid(back), back["resid_post", -1])
    close(back.stack_head_results(incl_remainder=True), cache.stack_head_results(incl_remainder=True))


def test_gradients_there_and_back():
    model, bridge, tokens, _ = build("plain")
    _, rec = model.run_with_cache(tokens, LOOPS, names_filter="blocks.*.hook_resid_post", loss_fn=metric)
    cache = to_depth(rec, bridge)
    found = to_sites(cache, model.config.topology(LOOPS))
    assert found.gradients is not None
    for site in rec:
        assert found[site] is rec[site]
        assert found.gradients[site] is rec.gradients[site]


def test_mappings_refuse_what_does_not_fit():
    model, bridge, tokens, _ = build("plain")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        _, longer = model.run_with_cache(tokens, LOOPS + 1)
        _, reduced = model.run_with_cache(tokens, LOOPS, names_filter="hook_embed", reduce=lambda x, name: x.mean())
    with pytest.raises(SiteError, match=r"beyond depth 6 of this topology"):
        to_sites(cache, model.config.topology(2))
    with pytest.raises(SiteError, match=r"has 4 loops, depth 10, the bridge has 8 layers: use model\.unroll\(4\)"):
        to_depth(longer, bridge)
    with pytest.raises(SiteError, match=r"record without reduce"):
        to_depth(reduced, bridge)
    with pytest.raises(SiteError, match=r"is it a cache of model\.unroll"):
        to_sites({"blocks.0.attn.hook_in": tokens}, model.config.topology(LOOPS))
    with pytest.raises(SiteError, match=r"not a site of a run with 3 loops"):
        depth_site("blocks.1.hook_resid_post@3", model.config.topology(LOOPS))
