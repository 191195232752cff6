"""Shipped schedules: what is recorded at (site, loop) is what the model's own modules give by hand, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hooks.foreign.discovery import discover
from hooks.foreign.schedules import Schedule, albert, hrm_text, huginn, ouro, schedule_of
from hooks.foreign.watching import watch
from studies.examples.architectures import HuginnLike, OuroLike

H, L = 2, 3


def tokens(batch: int = 2, pos: int = 6) -> torch.Tensor:
    return torch.randint(0, 50, (batch, pos), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def hrm():
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(0)
    config = HrmTextConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_layers_per_stack=2, head_dim=16,
                           num_attention_heads=2, H_cycles=H, L_cycles=L, max_position_embeddings=32,
                           initializer_range=0.3)
    return HrmTextForCausalLM(config).eval()


def hrm_by_hand(model, ids) -> dict[str, torch.Tensor]:
    """Outputs of every layer and stack, by site, from the model's own modules and the published recurrence."""
    inner, seen = model.model, {}
    x = inner.embed_tokens(ids) * inner.embedding_scale
    positions = torch.arange(ids.shape[1])[None]
    given = {"attention_mask": None, "position_embeddings": inner.rotary_emb(x, positions), "past_key_values": None,
             "position_ids": positions}

    def stack(which: str, state: torch.Tensor, loop: str) -> torch.Tensor:
        module = getattr(inner, which)
        for i, layer in enumerate(module.layers):
            state = layer(state, **given)
            seen[f"model.{which}.layers.{i}.hook_out@{loop}"] = state
        seen[f"model.{which}.hook_out@{loop}"] = module.final_norm(state)
        return module.final_norm(state)

    slow, fast = x, inner.z_L_init.expand_as(x)
    for h in range(H):
        for l in range(L):  # noqa: E741
            fast = stack("L_module", fast + slow, f"h{h}.l{l}")
        slow = stack("H_module", slow + fast, f"h{h}")
    return seen


@torch.no_grad()
def test_hrm_text_equals_its_modules_run_by_hand(hrm):
    model, ids = hrm, tokens()
    expected = hrm_by_hand(model, ids)
    with watch(model, ["model.*_module.layers.?.hook_out", "model.?_module.hook_out"]) as rec:  # known from config
        model(ids)
    assert set(rec) == set(expected)
    assert len({float(value.double().sum()) for value in expected.values()}) == len(expected)  # no two alike
    for site, value in expected.items():
        torch.testing.assert_close(rec[site], value, rtol=0, atol=0)
    assert rec.stack("model.L_module.hook_out").shape == (H, L, 2, 6, 32)
    assert torch.equal(rec["model.L_module.hook_out@h-1.l0"], expected["model.L_module.hook_out@h1.l0"])


@torch.no_grad()
def test_hrm_text_edit_in_one_cycle_leaves_those_before_alone(hrm):
    model, ids = hrm, tokens()
    with watch(model, "model.?_module.hook_out") as rec:
        model(ids)
    site = "model.L_module.layers.1.hook_out@h1.l1"
    with watch(model, "model.?_module.hook_out", fwd_hooks=[(site, lambda x, hook: x + 1)]) as edited:
        model(ids)
    changed = {name for name in rec if not torch.equal(rec[name], edited[name])}
    assert changed == {f"model.{name}" for name in ("L_module.hook_out@h1.l1", "L_module.hook_out@h1.l2",
                                                    "H_module.hook_out@h1")}


@torch.no_grad()
def test_a_transformer_lens_bridge_over_hrm_text(hrm):
    import copy

    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    ids, model = tokens(), copy.deepcopy(hrm)
    model.set_attn_implementation("eager")  # as the bridge computes it
    with watch(model, "model.*_module.layers.?.hook_out") as expected:
        model(ids)
    bridge = build_bridge_from_module(model, "HrmTextForCausalLM", hf_config=model.config)
    with watch(bridge, ["*_blocks.*.hook_resid_post", "L_blocks.0.attn.hook_q"]) as rec:
        logits = bridge(ids)
    for stack in "LH":
        for i in range(2):
            for loop in ([f"h{h}.l{low}" for h in range(H) for low in range(L)] if stack == "L" else ["h0", "h1"]):
                torch.testing.assert_close(rec[f"{stack}_blocks.{i}.hook_resid_post@{loop}"],
                                           expected[f"model.{stack}_module.layers.{i}.hook_out@{loop}"])
    assert rec["L_blocks.0.attn.hook_q@h0.l0"].shape == (2, 6, 2, 16)  # by head, as TransformerLens shows it
    _, cache = bridge.run_with_cache(ids)                                # ... which holds the last pass only
    for name in ("L_blocks.1.hook_out", "H_blocks.0.hook_out"):
        site = f"{name}@h-1.l-1" if name.startswith("L") else f"{name}@h-1"
        with watch(bridge, site) as rec:
            bridge(ids)
        assert torch.equal(rec[site], cache[name])

    def double_one_head(q, hook):
        assert q.shape == (2, 6, 2, 16)
        q = q.clone()
        q[:, :, 1] *= 2
        return q

    with watch(bridge, (), fwd_hooks=[("L_blocks.0.attn.hook_q@h1.l0", double_one_head)]):
        edited = bridge(ids)
    assert not torch.equal(edited, logits)
    assert torch.equal(bridge(ids), logits)


@torch.no_grad()
@pytest.mark.parametrize(("layers", "groups"), [(4, 1), (5, 2)])
def test_albert_equals_its_modules_run_by_hand(layers, groups):
    from transformers import AlbertConfig, AlbertForMaskedLM

    torch.manual_seed(0)
    config = AlbertConfig(vocab_size=50, embedding_size=16, hidden_size=32, num_hidden_layers=layers,
                          num_hidden_groups=groups, num_attention_heads=2, intermediate_size=48, inner_group_num=2,
                          max_position_embeddings=32, initializer_range=0.3)
    model, ids = AlbertForMaskedLM(config).eval(), tokens()
    encoder = model.albert.encoder
    x = encoder.embedding_hidden_mapping_in(model.albert.embeddings(ids))
    expected, ran = {}, [0] * groups
    for i in range(layers):
        group = i * groups // layers
        for j, layer in enumerate(encoder.albert_layer_groups[group].albert_layers):
            x = layer(x, None)
            name = f"albert.encoder.albert_layer_groups.{group}.albert_layers.{j}.hook_out"
            expected[f"{name}@{ran[group]}"] = x
        ran[group] += 1
    assert sum(ran) == layers
    assert set(ran) != {1}
    with watch(model, "**.albert_layers.?.hook_out") as rec:
        model(ids)
    assert set(rec) == set(expected)
    for site, value in expected.items():
        torch.testing.assert_close(rec[site], value, rtol=0, atol=0)
    assert albert(layers, groups) == schedule_of(model)


@torch.no_grad()
def test_ouro_equals_its_modules_run_by_hand():
    torch.manual_seed(0)
    model, ids = OuroLike(total_ut_steps=3), tokens()
    inner, expected = model.model, {}
    x = inner.embed_tokens(ids)
    for k in range(3):
        for i, layer in enumerate(inner.layers):
            expected[f"model.layers.{i}.hook_in@{k}"] = x
            x = layer(x)
        x = expected[f"model.norm.hook_out@{k}"] = inner.norm(x)
        expected[f"model.early_exit_gate.hook_out@{k}"] = inner.early_exit_gate(x)
    expected["model.hook_out"] = x  # the hidden state inside a dict inside a tuple
    with watch(model, ["model.layers.?.hook_in", "model.norm.hook_out", "model.early_exit_gate.hook_out",
                       "model.hook_out"]) as rec:
        model(ids)
    assert set(rec) == set(expected)
    for site, value in expected.items():
        assert torch.equal(rec[site], value), site
    assert ouro(3) == schedule_of(model)


@torch.no_grad()
def test_huginn_equals_its_modules_run_by_hand_from_the_seeded_state():
    torch.manual_seed(0)
    model, ids = HuginnLike(mean_recurrence=3), tokens()
    parts, expected = model.transformer, {}
    embeds = parts["wte"](ids)
    for i, block in enumerate(parts["prelude"]):
        embeds = expected[f"transformer.prelude.{i}.hook_out"] = block(embeds, i)
    x = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(5))
    for k in range(3):
        x = expected[f"transformer.adapter.hook_out@{k}"] = parts["adapter"](torch.cat([x, embeds], -1))
        for i, block in enumerate(parts["core_block"]):
            x = expected[f"transformer.core_block.{i}.hook_out@{k}"] = block(x, 0)
    x = expected["transformer.ln_f.hook_out@0"] = parts["ln_f"](x)
    for i, block in enumerate(parts["coda"]):
        x = expected[f"transformer.coda.{i}.hook_out"] = block(x, 0)
    expected["transformer.ln_f.hook_out@1"] = parts["ln_f"](x)
    sites = ["transformer.*.?.hook_out", "transformer.adapter.hook_out", "transformer.ln_f.hook_out"]
    state = torch.get_rng_state()
    with watch(model, sites, seed=5) as rec:
        model(ids)
        first = dict(rec)
        model(ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert set(rec) == set(expected)
    for site, value in expected.items():
        assert torch.equal(rec[site], value), site
        assert torch.equal(first[site], value), site
    assert huginn(3) == schedule_of(model)


@torch.no_grad()
def test_a_number_of_steps_given_at_runtime_needs_its_schedule():
    model, ids = HuginnLike(mean_recurrence=3), tokens()
    with (pytest.raises(RuntimeError, match=r"transformer\.core_block\.0 should run 3 times .* ran 2 times"),
          watch(model, "transformer.core_block.0.hook_out")):
        model(ids, num_steps=2)
    with watch(model, "transformer.core_block.0.hook_out", schedule=huginn(2)) as rec:
        model(ids, num_steps=2)
    assert list(rec) == ["transformer.core_block.0.hook_out@0", "transformer.core_block.0.hook_out@1"]


@pytest.mark.parametrize("make", [OuroLike, HuginnLike])
def test_discovery_agrees_with_the_shipped_schedules(make):
    model = make()
    declared = schedule_of(model)
    for path, calls in discover(model, (tokens(),)).schedule.calls:
        total = 1
        for _, count in declared.axes(path):
            total *= count
        assert total == calls, path


def test_discovery_agrees_with_hrm_text(hrm):
    declared = hrm_text(H, L)
    for path, calls in discover(hrm, (tokens(),)).schedule.calls:
        total = 1
        for _, count in declared.axes(path):
            total *= count
        assert total == calls, path


def test_keys_are_found_anywhere_in_a_path_and_the_longest_decides():
    schedule = Schedule({"layers": 4, "layers.3": 8, "core.*.attn": {"h": 2, "l": 3}})
    assert schedule.axes("model.layers.0.mlp") == (("", 4),)
    assert schedule.axes("model.layers.3.mlp") == (("", 8),)
    assert schedule.axes("core.7.attn.q") == (("h", 2), ("l", 3))
    assert schedule.axes("layers_of_another_kind.0") == ()
    assert schedule.axes("") == ()
    assert schedule == Schedule({"layers": 4, "layers.3": 8, "core.*.attn": {"h": 2, "l": 3}})


@pytest.mark.parametrize(("cycles", "message"), [
    ({"a": 0}, "whole numbers of at least 1, not 0"),
    ({"a": True}, "whole numbers of at least 1, not True"),
    ({"a": {"h": 2, "": 3}}, "nested cycles are told apart by letters"),
    ({"a": {}}, "is empty"),
])
def test_schedules_that_make_no_sense_are_refused(cycles, message):
    with pytest.raises(ValueError, match=message):
        Schedule(cycles)


def test_entries_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"two entries of the schedule cover 'a\.b' and disagree"):
        Schedule({"a": 2, "b": 3}).axes("a.b")


def test_an_unknown_model_has_no_schedule():
    assert schedule_of(nn.Linear(2, 2)) is None
