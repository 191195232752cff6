"""The model: identities between its ways of running, and independent references for its parts."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hooks import HookedLoopMDM, LoopMDMConfig
from hooks.model.layers import rotary_tables, rotate
from hooks.model.loopmdm import LoopMDM
from tests.small import MASK, VARIANTS, naive_injection, small_config, small_model, small_tokens

variants = pytest.mark.parametrize("variant", list(VARIANTS))


@variants
def test_the_looped_forward_is_the_naive_loop_over_blocks(variant: str) -> None:
    model, tokens = small_model(**VARIANTS[variant]), small_tokens()
    config = model.config
    with torch.no_grad():
        looped = model(tokens, n_loops=5)
        condition = model.condition(tokens)
        pos = tokens.shape[1]
        rotary = None if config.position == "learned" else tuple(
            table[:pos] for table in rotary_tables(config.max_seq_len, config.d_head, config.rotary_base))
        embedded = model.embed_tokens(tokens)
        x = embedded
        for layer in range(config.n_head_layers):
            x = model.blocks[layer](x, rotary, condition)
        added = naive_injection(model, embedded, x)
        for loop in range(5):
            x = x + added
            if config.loop_embedding == "learned":
                x = x + model.loop_embed.weight[min(loop, config.max_loops - 1)]
            for layer in range(config.n_head_layers, config.n_head_layers + config.n_loop_layers):
                x = model.blocks[layer](x, rotary, condition)
        for layer in range(config.n_head_layers + config.n_loop_layers, config.n_layers):
            x = model.blocks[layer](x, rotary, condition)
        rounding = 1e-5 if config.input_injection == "head" else 0.0  # normalised in another order here
        torch.testing.assert_close(model.unembed(x, condition), looped, atol=rounding, rtol=rounding)


@variants
def test_parts_of_the_residual_stream_sum_to_the_whole(variant: str) -> None:
    model, tokens = small_model(**VARIANTS[variant]), small_tokens()
    with torch.no_grad():  # the final norm is left unhooked: asked for its scale, it computes in another order
        logits, rec = model.run_with_cache(tokens, n_loops=3, names_filter=lambda name: not name.startswith("ln_final"))
    total = rec["hook_embed"] + rec.get("hook_pos_embed", 0)
    for layer, loop in model.config.topology(3).unrolled():
        at = "" if loop is None else f"@{loop}"
        if loop is not None and layer == model.config.n_head_layers:
            total = total + sum(rec[f"{name}{at}"] for name in ("hook_injection", "hook_loop_embed")
                                if f"{name}{at}" in rec)
        pre, attn, mid, mlp, post = (rec[f"blocks.{layer}.hook_{what}{at}"]
                                     for what in ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post"))
        assert torch.equal(pre + attn, mid)
        assert torch.equal(mid + mlp, post)
        total = total + attn + mlp
    last = rec[model.config.topology(3).site_at(-1)]
    torch.testing.assert_close(total, last, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert torch.equal(model.unembed(last, model.condition(tokens)), logits)


@variants
def test_one_loop_equals_the_unlooped_model_of_the_same_weights(variant: str) -> None:
    model, tokens = small_model(**VARIANTS[variant]), small_tokens()
    twin = HookedLoopMDM(small_config(**{**VARIANTS[variant], "max_loops": 1})).eval()
    state = model.state_dict()
    if "loop_embed.weight" in state:
        state["loop_embed.weight"] = state["loop_embed.weight"][:1]
    twin.load_state_dict(state)
    with torch.no_grad():
        assert torch.equal(twin(tokens), model(tokens, n_loops=1))
        assert not torch.allclose(twin(tokens), model(tokens, n_loops=2))


@variants
def test_hooks_that_only_look_leave_the_output_unchanged(variant: str) -> None:
    model, tokens = small_model(**VARIANTS[variant]), small_tokens()
    with torch.no_grad():
        plain = model(tokens, n_loops=3)
        seen, _ = model.run_with_cache(tokens, n_loops=3, names_filter="blocks.*.hook_resid_post")
        assert torch.equal(plain, seen)
        every, _ = model.run_with_cache(tokens, n_loops=3, names_filter="*")  # patterns, scales and results too
        torch.testing.assert_close(every, plain, atol=1e-5, rtol=1e-5)


@variants
def test_save_and_load_keep_every_weight(variant: str, tmp_path: Path) -> None:
    model, tokens = small_model(seed=3, **VARIANTS[variant]), small_tokens()
    model.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir() if p.name != "README.md") == [
        "config.json", "model.safetensors"]
    loaded = HookedLoopMDM.from_pretrained(tmp_path / "m")
    assert loaded.config == model.config
    assert not loaded.training
    for (name, a), (_, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(loaded(tokens, n_loops=3), model(tokens, n_loops=3))


@variants
def test_deepcopy_and_pickle_give_an_independent_equal_model(variant: str) -> None:
    model, tokens = small_model(**VARIANTS[variant]), small_tokens()
    with torch.no_grad():
        expected = model(tokens)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            name = f"blocks.{model.config.n_head_layers}.hook_resid_post"
            (_, copied), (_, original) = (m.run_with_cache(tokens, names_filter=name) for m in (twin, model))
            assert torch.equal(twin(tokens), expected)
            assert torch.equal(copied.stack(name), original.stack(name))
            fired: list[str] = []
            with twin.hooks([("hook_loop_in", lambda x, hook, fired=fired: fired.append(hook.site))]):
                model(tokens)
                assert not fired  # the copy's hooks are not the original's
                twin(tokens)
            assert fired == [f"hook_loop_in@{k}" for k in range(4)]
            twin.unembed_bias += 1
            assert torch.equal(model(tokens), expected)


def naive_attention(model: LoopMDM, layer: int, x: Tensor) -> Tensor:
    """Softmax attention written out head by head and position by position, with complex-number RoPE."""
    attn, config = model.blocks[layer].attn, model.config
    d = config.d_head
    w_q, w_k, w_v = attn.qkv.weight.chunk(3)
    out = torch.zeros_like(x)

    def rotated(v: Tensor, position: int) -> Tensor:
        if config.position == "learned":
            return v
        pairs = torch.complex(v[: d // 2].double(), v[d // 2:].double())
        angle = position * config.rotary_base ** (-torch.arange(d // 2, dtype=torch.float64) * 2 / d)
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag]).float()

    def normed(v: Tensor, weight: Tensor) -> Tensor:
        return v / math.sqrt(float(v.pow(2).mean()) + config.norm_eps) * weight

    for b in range(x.shape[0]):
        for h in range(config.n_heads):
            rows = slice(h * d, (h + 1) * d)
            q, k, v = x[b] @ w_q[rows].T, x[b] @ w_k[rows].T, x[b] @ w_v[rows].T
            if config.qk_norm:
                q = torch.stack([normed(row, attn.q_norm) for row in q])
                k = torch.stack([normed(row, attn.k_norm) for row in k])
            q = torch.stack([rotated(row, i) for i, row in enumerate(q)])
            k = torch.stack([rotated(row, i) for i, row in enumerate(k)])
            for i in range(len(q)):
                weights = torch.exp(torch.stack([torch.dot(q[i], key) for key in k]) / math.sqrt(d))
                z = (weights / weights.sum()) @ v
                out[b, i] += attn.out.weight[:, rows] @ z
    return out


@pytest.mark.parametrize("variant", ["plain", "learned", "no-qk-norm"])
def test_attention_against_a_naive_reference(variant: str) -> None:
    model, tokens = small_model(**VARIANTS[variant]), small_tokens()
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, n_loops=2, names_filter=["blocks.1.**@1"])
        normed = rec["blocks.1.ln1.hook_normalized@1"]
        expected = naive_attention(model, 1, normed)
        torch.testing.assert_close(rec["blocks.1.hook_attn_out@1"], expected, atol=1e-5, rtol=1e-4)
        _, light = model.run_with_cache(tokens, n_loops=2, names_filter="blocks.1.hook_attn_out@1")
        torch.testing.assert_close(light["blocks.1.hook_attn_out@1"], expected, atol=1e-5, rtol=1e-4)
    pattern = rec["blocks.1.attn.hook_pattern@1"]
    torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
    torch.testing.assert_close(rec["blocks.1.attn.hook_attn_scores@1"].softmax(-1), pattern)


def test_a_model_takes_lengths_and_precisions_in_turn() -> None:
    model, tokens = small_model(), small_tokens()
    for n in (10, 4, 7, 10):
        assert torch.equal(model(tokens[:, :n], 2), small_model()(tokens[:, :n], 2))
    assert model.bfloat16()(tokens, 2).dtype == torch.bfloat16


def test_rotary_scores_depend_on_distance_alone() -> None:
    cos, sin = rotary_tables(12, 8, 100.0)
    q, k = torch.randn(8), torch.randn(8)
    scores = rotate(q.expand(1, 12, 1, 8), (cos, sin))[0, :, 0] @ rotate(k.expand(1, 12, 1, 8), (cos, sin))[0, :, 0].T
    for offset in range(-11, 12):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=1e-5)
    assert scores.std() > 0.1


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_against_its_formula(kind: str) -> None:
    model, tokens = small_model(norm=kind), small_tokens()
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, n_loops=2, names_filter=["blocks.2.hook_resid_mid@0", "blocks.2.ln2.*@0"])
        _, light = model.run_with_cache(tokens, n_loops=2, names_filter="blocks.2.ln2.hook_normalized@0")
    x = rec["blocks.2.hook_resid_mid@0"].double()
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    scale = torch.sqrt((x * x).mean(-1, keepdim=True) + model.config.norm_eps)
    expected = (x / scale * model.blocks[2].ln2.weight.detach()).float()
    torch.testing.assert_close(rec["blocks.2.ln2.hook_scale@0"], scale.float())
    torch.testing.assert_close(rec["blocks.2.ln2.hook_normalized@0"], expected)
    torch.testing.assert_close(light["blocks.2.ln2.hook_normalized@0"], expected)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_mlp_against_its_formula(mlp: str) -> None:
    model, tokens = small_model(mlp=mlp), small_tokens()
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, n_loops=1, names_filter="blocks.1.**")
        up, down = model.blocks[1].mlp.up, model.blocks[1].mlp.down
        x = rec["blocks.1.ln2.hook_normalized@0"]
        if mlp == "gelu":
            pre = x @ up.weight.T + up.bias
            act = 0.5 * pre * (1 + torch.tanh(math.sqrt(2 / math.pi) * (pre + 0.044715 * pre ** 3)))
            expected = act @ down.weight.T + down.bias
        else:
            gate, value = (x @ up.weight.T).split(model.config.d_mlp, dim=-1)
            expected = (gate * torch.sigmoid(gate) * value) @ down.weight.T
    torch.testing.assert_close(rec["blocks.1.hook_mlp_out@0"], expected, atol=1e-5, rtol=1e-4)


@variants
def test_the_mask_is_never_predicted(variant: str) -> None:
    model, tokens = small_model(**VARIANTS[variant]), small_tokens()
    with torch.no_grad():
        model.unembed_bias[MASK] = 50.0
        probabilities = model(tokens).softmax(-1)
    assert torch.equal(probabilities[..., MASK], torch.zeros(tokens.shape))
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(tokens.shape))


@variants
def test_adaptive_looping_with_threshold_zero_is_fixed_looping(variant: str) -> None:
    model, tokens = small_model(**VARIANTS[variant]), small_tokens()
    with torch.no_grad():
        logits, used = model.forward_adaptive(tokens, threshold=0.0, max_loops=3)
        assert torch.equal(logits, model(tokens, n_loops=3))
    assert used.tolist() == [3, 3, 3]


def test_adaptive_looping_stops_each_example_by_itself() -> None:
    model, tokens = small_model(), small_tokens(batch=6)
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, n_loops=8, names_filter=["hook_loop_in", "blocks.2.hook_resid_post"])
        before, after = rec.stack("hook_loop_in"), rec.stack("blocks.2.hook_resid_post")
        change = (after - before).flatten(2).norm(dim=-1) / before.flatten(2).norm(dim=-1)      # [loop, batch]
        threshold = float(change.median())
        logits, used = model.forward_adaptive(tokens, threshold=threshold, max_loops=8)
        below = change < threshold
        expected = torch.where(below.any(0), below.int().argmax(0) + 1, 8)
        assert used.tolist() == expected.tolist()
        assert len(set(used.tolist())) > 1  # or the test shows nothing
        for i, loops in enumerate(used.tolist()):
            torch.testing.assert_close(logits[i], model(tokens[i:i + 1], n_loops=loops)[0], atol=1e-5, rtol=1e-5)


def test_batch_and_time_are_independent_per_example() -> None:
    model, tokens = small_model(**VARIANTS["everything"]), small_tokens(batch=4)
    t = torch.tensor([0.2, 0.4, 0.6, 1.0])
    with torch.no_grad():
        together = model(tokens, n_loops=2, t=t)
        for i in range(4):
            alone = model(tokens[i:i + 1], n_loops=2, t=float(t[i]))
            torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
        share = (tokens == MASK).float().mean(1)
        assert torch.equal(model(tokens, n_loops=2), model(tokens, n_loops=2, t=share))
        assert not torch.allclose(model(tokens, n_loops=2, t=0.1), together)


def test_a_fresh_model_predicts_every_token_but_the_mask_alike() -> None:
    model, tokens = HookedLoopMDM(small_config()), small_tokens()
    with torch.no_grad():
        probabilities = model(tokens).softmax(-1)
    torch.testing.assert_close(probabilities[..., :MASK], torch.full((*tokens.shape, MASK), 1 / MASK))


def test_the_same_generator_gives_the_same_weights() -> None:
    a, b = HookedLoopMDM(small_config()), HookedLoopMDM(small_config())
    for model in (a, b):
        model.reset_parameters(torch.Generator().manual_seed(5))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    spread = a.blocks[0].mlp.down.weight.std()
    assert abs(float(spread.detach()) * math.sqrt(a.config.d_mlp) - 1) < 0.2


def test_training_reaches_every_parameter() -> None:
    for variant, changes in VARIANTS.items():
        model, tokens = small_model(**changes), small_tokens()
        F.cross_entropy(model(tokens).flatten(0, 1), small_tokens(seed=1).clamp(max=MASK - 1).flatten()).backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        assert not missing, (variant, missing)


# ------------------------------------------------------------------------- errors


@pytest.mark.unchecked
@pytest.mark.parametrize(("changes", "message"), [
    ({"mask_token_id": 7}, r"mask_token_id 7 is outside the vocabulary 0..6; vocab_size counts the mask token too"),
    ({"n_heads": 3}, r"d_model 16 is not a multiple of n_heads 3"),
    ({"d_model": 6, "n_heads": 2}, r"rotary positions need an even head width; d_model / n_heads is 3"),
    ({"n_loop_layers": 0}, r"n_loop_layers must be at least 1, not 0"),
    ({"max_loops": 0}, r"max_loops must be at least 1"),
    ({"n_head_layers": -1}, r"n_head_layers must be at least 0"),
    ({"norm": "batch"}, r"norm must be one of rms, layer, not 'batch'"),
    ({"position": "sine"}, r"position must be one of rotary, learned, both"),
    ({"mlp": "relu"}, r"mlp must be one of"),
    ({"input_injection": "mul"}, r"input_injection must be one of"),
    ({"loop_embedding": "sine"}, r"loop_embedding must be one of"),
    ({"time_conditioning": "cosine"}, r"time_conditioning must be one of"),
    ({"position": "learned", "position_groups": ((0, 1),)}, r"one id per position, 10 in all"),
    ({"position_groups": ((0,) * 10,)}, r"position_groups are learned positions: set position"),
])
def test_illegal_configurations_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_config(**changes)


def test_unknown_and_missing_configuration_keys_are_named() -> None:
    values = small_config().to_dict()
    assert LoopMDMConfig.from_dict(json.loads(json.dumps(values))) == small_config()
    with pytest.raises(ValueError, match=r"unknown configuration keys \['n_layer'\]; known ones are .*n_tail_layers"):
        LoopMDMConfig.from_dict({**values, "n_layer": 3})
    del values["vocab_size"]
    with pytest.raises(ValueError, match=r"configuration keys \['vocab_size'\] are missing"):
        LoopMDMConfig.from_dict(values)


@pytest.mark.unchecked
@pytest.mark.parametrize(("tokens", "message"), [
    (torch.full((1, 3), 7), r"tokens hold the ids 7..7, the vocabulary is 0..6: they were encoded for another model"),
    (torch.full((1, 3), -1), r"tokens hold the ids -1..-1"),
    (torch.zeros(1, 11, dtype=torch.long), r"the sequence has 11 positions, the model takes at most 10"),
    (torch.zeros(3, dtype=torch.long), r"tokens must be \[batch, pos\], not of shape \(3,\); a single sequence is"),
    (torch.zeros(1, 3), r"tokens must be integers, not torch.float32"),
])
def test_bad_tokens_are_refused(tokens: Tensor, message: str) -> None:
    model = small_model()
    with pytest.raises(ValueError, match=message):
        model(tokens)
    with pytest.raises(ValueError, match=message):
        model.forward_adaptive(tokens, threshold=0.1)


@pytest.mark.unchecked
@pytest.mark.parametrize("n_loops", [0, -1, 2.0, True])
def test_fewer_than_one_loop_is_refused(n_loops: object) -> None:
    model = small_model()
    for run in (model, model.run_with_cache, model.run_with_hooks):
        with pytest.raises(ValueError, match="n_loops must be a whole number of at least 1"):
            run(small_tokens(), n_loops)


@pytest.mark.parametrize("threshold", [-0.1, float("nan")])
def test_a_negative_threshold_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match="threshold must be a relative change of at least 0"):
        small_model().forward_adaptive(small_tokens(), threshold=threshold)


def test_damaged_folders_are_refused_with_the_file_and_the_mismatch(tmp_path: Path) -> None:
    folder = tmp_path / "m"

    def fresh() -> None:
        small_model().save_pretrained(folder)

    def refused(kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            HookedLoopMDM.from_pretrained(folder)

    fresh()
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 1, 4, 0):
        weights.write_bytes(whole[:cut])
        refused(ValueError, r"model.safetensors is not a whole safetensors file .*copy or download it again")
    weights.unlink()
    refused(FileNotFoundError, r"model.safetensors is missing: a model folder holds config.json and model.safetensors")
    fresh()
    (folder / "config.json").write_text("{ not json")
    refused(ValueError, r"config.json is not JSON .*copy or download it again")
    values = small_config().to_dict()
    (folder / "config.json").write_text(json.dumps({**values, "depth": 3}))
    refused(ValueError, r"config.json: unknown configuration keys \['depth'\]")
    (folder / "config.json").write_text(json.dumps({**values, "d_mlp": 32}))
    refused(ValueError, r"model.safetensors does not fit its config.json: blocks.0.mlp.up.weight has shape \(24, 16\), "
                        r"config.json asks for \(32, 16\) \(and \d+ more\)")
    (folder / "config.json").write_text(json.dumps({**values, "n_tail_layers": 2}))
    refused(ValueError, r"blocks.4.* is missing")
    (folder / "config.json").write_text(json.dumps({**values, "n_tail_layers": 0}))
    refused(ValueError, r"blocks.3.* is not part of this model")
    (folder / "config.json").unlink()
    refused(FileNotFoundError, r"config.json is missing")
    assert not list(folder.glob(".*"))  # nothing half-written is left behind
