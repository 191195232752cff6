"""Recording, gradients and hooks by site and loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import SiteError
from hooks.recording import Recording, axes_of
from tests.small import MASK, VARIANTS, attached, small_model, small_tokens

# ---------------------------------------------------------------------- recording


def test_each_loop_is_recorded_as_the_shorter_run_computes_it() -> None:
    model, tokens = small_model(), small_tokens()
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, n_loops=5, names_filter="blocks.*.hook_resid_post")
        for k in range(5):
            _, shorter = model.run_with_cache(tokens, n_loops=k + 1, names_filter="blocks.2.hook_resid_post@-1")
            assert torch.equal(rec[f"blocks.2.hook_resid_post@{k}"], shorter[f"blocks.2.hook_resid_post@{k}"])
            state = rec[f"blocks.2.hook_resid_post@{k}"]
            if k < 4:
                after = model.loop(state, k + 1, model.embed_tokens(tokens))
                assert torch.equal(after, rec[f"blocks.2.hook_resid_post@{k + 1}"])
    assert torch.equal(rec.stack("blocks.2.hook_resid_post")[3], rec["blocks.2.hook_resid_post@3"])
    assert torch.equal(rec["blocks.2.hook_resid_post@-1"], rec["blocks.2.hook_resid_post@4"])


@pytest.mark.parametrize("variant", ["plain", "everything", "swiglu"])
def test_every_site_of_the_space_fires_once_with_its_axes(variant: str) -> None:
    model, tokens = small_model(**VARIANTS[variant]), small_tokens()
    counts: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def count(activation: Tensor, *, hook: Any) -> None:
        counts[hook.site] = counts.get(hook.site, 0) + 1
        shapes[hook.site] = tuple(activation.shape)

    model.run_with_hooks(tokens, n_loops=3, fwd_hooks=[("**", count)])
    assert counts == {str(site): 1 for site in model.site_space(3).all()}
    config = model.config
    sizes = {"batch": 3, "pos": 9, "query": 9, "key": 9, "head": config.n_heads, "d_head": config.d_head,
             "d_model": config.d_model, "d_mlp": config.d_mlp, "one": 1}
    for site, shape in shapes.items():
        assert shape == tuple(sizes[axis] for axis in axes_of(site.partition("@")[0])), site


def test_results_per_head_sum_to_the_attention_output() -> None:
    model, tokens = small_model(), small_tokens()
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, n_loops=2, names_filter=["blocks.1.attn.hook_result@1",
                                                                       "blocks.1.hook_attn_out@1"])
    torch.testing.assert_close(rec["blocks.1.attn.hook_result@1"].sum(2), rec["blocks.1.hook_attn_out@1"])


def test_the_default_is_everything_but_the_results_per_head() -> None:
    model = small_model()
    _, rec = model.run_with_cache(small_tokens(), n_loops=2)
    assert set(rec) == {str(site) for site in model.site_space(2).all() if not site.name.endswith("hook_result")}


def test_a_recording_is_a_mapping_of_copies_that_holds_no_model() -> None:
    model, tokens = small_model(), small_tokens()
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, n_loops=2, names_filter="blocks.1.hook_resid_post")
        before = rec["blocks.1.hook_resid_post@0"].clone()
        rec["blocks.1.hook_resid_post@0"].zero_()
        _, again = model.run_with_cache(tokens, n_loops=2, names_filter="blocks.1.hook_resid_post")
    assert torch.equal(again["blocks.1.hook_resid_post@0"], before)
    assert list(rec) == ["blocks.1.hook_resid_post@0", "blocks.1.hook_resid_post@1"]
    assert "blocks.1.hook_resid_post@1" in rec
    assert "blocks.1.hook_resid_post@2" not in rec
    assert rec.get("hook_embed") is None
    assert not any(isinstance(value, torch.nn.Module) for value in vars(rec).values())


def test_a_looped_name_never_means_its_last_loop() -> None:
    model = small_model()
    _, rec = model.run_with_cache(small_tokens(), n_loops=3, names_filter=["blocks.1.hook_resid_post@1",
                                                                           "blocks.0.hook_resid_post"])
    with pytest.raises(SiteError, match=r"names 3 sites, from .*@0 to .*@2; say which one"):
        rec["blocks.1.hook_resid_post"]
    with pytest.raises(SiteError, match=r"@0 was not recorded in this run; of blocks.1.hook_resid_post there are "
                                        r"blocks.1.hook_resid_post@1. Add it to names_filter"):
        rec["blocks.1.hook_resid_post@0"]
    with pytest.raises(SiteError, match="was not recorded"):
        rec.stack("blocks.1.hook_resid_post")
    with pytest.raises(SiteError, match="runs once and has no loops to stack"):
        rec.stack("blocks.0.hook_resid_post")
    with pytest.raises(SiteError, match=r"is a pattern; stack\(\) takes one name"):
        rec.stack("blocks.*.hook_resid_post")
    with pytest.raises(SiteError, match="No site is called 'hook_embed'"):
        rec["hook_embed"]


def test_positions_dtype_and_device_of_the_copy() -> None:
    model, tokens = small_model(), small_tokens()
    names = ["blocks.1.hook_resid_post", "blocks.1.attn.hook_q", "hook_embed"]
    _, full = model.run_with_cache(tokens, n_loops=2, names_filter=names)
    index = torch.tensor([8, 0])
    for pos in (slice(2, 5), index, torch.arange(9) % 2 == 0):
        _, cut = model.run_with_cache(tokens, n_loops=2, names_filter=names, pos_slice=pos)
        for site in full:
            assert torch.equal(cut[site], full[site][:, pos])
    for listed in ([8, 0], [], [True] + [False] * 8):  # lists, as a tensor of them
        _, cut = model.run_with_cache(tokens, n_loops=2, names_filter=names, pos_slice=listed, batch_slice=[2, 0])
        for site in full:
            assert torch.equal(cut[site], full[site][[2, 0]][:, listed])
    _, half = model.run_with_cache(tokens, n_loops=2, names_filter=names, dtype=torch.bfloat16, device="cpu")
    assert all(torch.equal(half[site], full[site].bfloat16()) for site in full)


def test_the_residual_stream_is_labelled_by_depth_layer_and_loop() -> None:
    model, tokens = small_model(), small_tokens()
    _, rec = model.run_with_cache(tokens, n_loops=3, names_filter="blocks.*.hook_resid_post")
    stream = rec.residual_stream()
    assert stream.dims == ("depth", "batch", "pos", "d_model")
    assert stream.layer.values.tolist() == [0, 1, 2, 1, 2, 1, 2, 3]
    assert stream.loop.values.tolist() == [-1, 0, 0, 1, 1, 2, 2, -1]
    for depth in range(8):
        layer, loop = int(stream.layer[depth]), int(stream.loop[depth])
        site = f"blocks.{layer}.hook_resid_post" + ("" if loop < 0 else f"@{loop}")
        assert (stream.values[depth] == rec[site].numpy()).all()
    for attribute in ("long_name", "units", "definition"):
        assert stream.attrs[attribute]
    array = rec.to_xarray("blocks.1.hook_resid_post")
    assert array.dims == ("loop", "batch", "pos", "d_model")
    assert (array.values == rec.stack("blocks.1.hook_resid_post").numpy()).all()
    with pytest.raises(SiteError, match=r"8 of 8 residual sites were not recorded, blocks.0.hook_mlp_out first"):
        rec.residual_stream("hook_mlp_out")
    with pytest.raises(SiteError, match="without a head → mid → tail layout"):
        Recording({}, {}).residual_stream()


# ---------------------------------------------------------------------- gradients


def test_gradients_at_loop_sites_are_those_of_autograd() -> None:
    model, tokens = small_model(), small_tokens()
    sites = ["blocks.2.hook_resid_post", "hook_embed"]

    def loss(logits: Tensor) -> Tensor:
        return logits[..., :MASK].log_softmax(-1)[..., 2].sum()

    with torch.no_grad():  # loss_fn asks for gradients whatever the caller's mode
        _, rec = model.run_with_cache(tokens, n_loops=3, names_filter=sites, loss_fn=loss)
    assert set(rec.gradients) == set(rec) == {"hook_embed", *(f"blocks.2.hook_resid_post@{k}" for k in range(3))}
    for k in range(3):
        state = rec[f"blocks.2.hook_resid_post@{k}"].clone().requires_grad_()
        x, embedded = state, model.embed_tokens(tokens)
        for loop in range(k + 1, 3):
            x = model.loop(x, loop, embedded)
        expected, = torch.autograd.grad(loss(model.tail(x)), state)
        torch.testing.assert_close(rec.gradients[f"blocks.2.hook_resid_post@{k}"], expected)
        assert expected.abs().max() > 0


def test_backward_hooks_fire_per_loop_from_last_to_first_and_may_replace() -> None:
    model, tokens = small_model(), small_tokens()
    fired: list[str] = []

    def stop(gradient: Tensor, *, hook: Any) -> Tensor | None:
        fired.append(hook.site)
        return torch.zeros_like(gradient) if hook.site.endswith("@0") else None

    with model.hooks(bwd_hooks=[("blocks.2.hook_resid_post", stop)], n_loops=3):
        model(tokens, 3)[..., :MASK].pow(2).sum().backward()
    assert fired == [f"blocks.2.hook_resid_post@{k}" for k in (2, 1, 0)]
    assert not model.embed.weight.grad.any()                   # nothing flows past loop 0 …
    assert model.blocks[1].attn.qkv.weight.grad.any()          # … but later loops do reach their weights
    assert attached(model) == 0


# ------------------------------------------------------------------------ editing


def test_patching_a_site_with_itself_changes_nothing() -> None:
    for changes in VARIANTS.values():
        model, tokens = small_model(**changes), small_tokens()
        with torch.no_grad():
            plain = model(tokens, n_loops=3)
            logits, rec = model.run_with_cache(tokens, n_loops=3, names_filter=lambda n: n.endswith("hook_resid_post"))
            assert torch.equal(plain, logits)
            for site in rec:
                patched = model.run_with_hooks(
                    tokens, n_loops=3, fwd_hooks=[(site, lambda x, hook, rec=rec: rec[hook.site])])
                assert torch.equal(patched, logits), site


def test_patching_a_loop_from_another_run_gives_the_other_run_from_there_on() -> None:
    model, tokens, others = small_model(), small_tokens(), small_tokens(seed=1)
    with torch.no_grad():
        other, rec = model.run_with_cache(others, n_loops=4, names_filter="blocks.2.hook_resid_post")
        own = model(tokens, n_loops=4)
        for k in range(4):
            site = f"blocks.2.hook_resid_post@{k}"
            patched = model.run_with_hooks(tokens, 4, fwd_hooks=[(site, lambda x, hook: rec[hook.site])])
            assert torch.equal(patched, other)
    assert not torch.allclose(own, other)


def test_a_hook_at_one_loop_leaves_the_earlier_loops_alone() -> None:
    model, tokens = small_model(), small_tokens()
    names = "blocks.2.hook_resid_post"
    with torch.no_grad():
        _, before = model.run_with_cache(tokens, 5, names_filter=names)
        with model.hooks([(f"{names}@2", lambda x, hook: x + 1)], n_loops=5):
            _, after = model.run_with_cache(tokens, 5, names_filter=names)
    assert torch.equal(after[f"{names}@2"], before[f"{names}@2"] + 1)  # hooks run in the order in which they came
    for k in range(5):
        assert torch.equal(before[f"{names}@{k}"], after[f"{names}@{k}"]) == (k < 2)


def test_edited_scores_give_the_pattern_of_the_edited_scores() -> None:
    model, tokens = small_model(), small_tokens()

    def only_the_first_key(scores: Tensor, *, hook: Any) -> Tensor:
        return scores.index_fill(-1, torch.arange(1, scores.shape[-1]), -torch.inf)

    with model.hooks([("blocks.1.attn.hook_attn_scores@1", only_the_first_key)], n_loops=2):
        _, rec = model.run_with_cache(tokens, 2, names_filter=["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_*"])
    pattern = rec["blocks.1.attn.hook_pattern@1"]
    assert torch.equal(pattern[..., 0], torch.ones_like(pattern[..., 0]))
    values = rec["blocks.1.attn.hook_v@1"][:, :1].expand_as(rec["blocks.1.attn.hook_z@1"])
    torch.testing.assert_close(rec["blocks.1.attn.hook_z@1"], values)
