"""The unrolled bridge equals the looped model and shares its parameters; what it refuses, it refuses clearly."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

from hooks.bridges.interop import depth_site, entered_resid, to_sites
from hooks.bridges.tl_adapter import ARCHITECTURE, LoopMDMArchitectureAdapter
from tests.small import VARIANTS, small_model, small_tokens
from tests.small_unrolled import BY_EXAMPLE, LOOPS, build, close, fresh, visible


@pytest.fixture(params=list(VARIANTS))
def variant(request):
    return request.param


# ---------------------------------------------------------------- the same network

def test_logits_depth_and_parameters(variant):
    model, bridge, tokens, expected = build(variant)
    assert bridge.cfg.n_layers == model.config.topology(LOOPS).depth == len(bridge.blocks)
    with torch.no_grad():
        close(visible(bridge(tokens)), visible(expected))
    assert {id(p) for p in bridge.parameters()} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", sorted(BY_EXAMPLE))
def test_each_example_keeps_its_own_noise_level(name):
    model = small_model(**VARIANTS[name])
    bridge, tokens = model.unroll(LOOPS), small_tokens()
    with torch.no_grad():
        close(visible(bridge(tokens)), visible(model(tokens, LOOPS)))
        level = torch.tensor([0.2, 0.5, 0.9])
        close(visible(bridge(tokens, t=level)), visible(model(tokens, LOOPS, t=level)))
        assert not torch.allclose(visible(bridge(tokens)), visible(bridge(tokens, t=0.9)), atol=1e-3)
        _, cache = bridge.run_with_cache(tokens)
    close(cache.decompose_resid().sum(0) + entered_resid(cache), cache["resid_post", -1])
    with pytest.raises(NotImplementedError, match=r"no single W_U: unroll at one noise level"):
        _ = bridge.W_U


def test_every_site_agrees_with_the_looped_run(variant):
    model, bridge, tokens, _ = fresh(variant)
    bridge.set_use_attn_result(True)
    t = 0.4 if variant in BY_EXAMPLE else None
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens)
        _, rec = model.run_with_cache(tokens, LOOPS, names_filter="*", t=t)
    found = to_sites(cache, model.config.topology(LOOPS))
    assert set(found) == set(rec)
    for site in rec:
        if "hook_result" in site and model.config.conditioned:  # at one noise level its heads carry adaLN's gate
            close(found[site].sum(2), rec[site.replace("attn.hook_result", "hook_attn_out")])
        else:
            close(found[site], rec[site])
    close(torch.from_numpy(found.residual_stream().values), torch.from_numpy(rec.residual_stream().values))


def test_editing_the_looped_model_edits_the_unrolled_one(variant):
    model, bridge, tokens, before = fresh(variant)
    t = 0.4 if variant in BY_EXAMPLE else None
    biases = [b.clone() for b in (bridge.b_out,)] if not VARIANTS[variant].get("mlp") else []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        after = model(tokens, LOOPS, t=t)
        assert not torch.allclose(visible(after), visible(before), atol=1e-3)
        close(visible(bridge(tokens)), visible(after))
        if biases:
            assert not torch.allclose(bridge.b_out, biases[0])
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.9          # replaced storage, as .to(device) does
    with torch.no_grad():
        close(visible(bridge(tokens)), visible(model(tokens, LOOPS, t=t)))


def test_gradients_arrive_at_the_looped_models_parameters(variant):
    model, bridge, tokens, _ = fresh(variant)
    t = 0.4 if variant in BY_EXAMPLE else None
    visible(model(tokens, LOOPS, t=t)).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    visible(bridge(tokens)).square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().max()) + 1e-6)


@pytest.mark.parametrize("hook", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out",
                                  "hook_mlp_out", "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q",
                                  "attn.hook_z", "attn.hook_attn_scores", "attn.hook_pattern", "mlp.hook_pre",
                                  "mlp.hook_post", "ln1.hook_scale", "ln2.hook_normalized"])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_an_edit_by_depth_is_the_edit_by_site(name, hook):
    """Among them hook_resid_mid: on TransformerLens' own bridges its alias edits only what the MLP reads."""
    model, bridge, tokens, unedited = build(name)
    topology = model.config.topology(LOOPS)
    site = topology.site_at(topology.n_head + topology.n_mid, hook)
    t = 0.4 if name in BY_EXAMPLE else None
    with torch.no_grad():
        expected = model.run_with_hooks(tokens, LOOPS, t=t, fwd_hooks=[(site, lambda x, hook: 1.5 * x + 0.1)])
        got = bridge.run_with_hooks(tokens, fwd_hooks=[(depth_site(site, topology), lambda x, hook: 1.5 * x + 0.1)])
    assert not torch.allclose(visible(expected), visible(unedited), atol=1e-4)
    close(visible(got), visible(expected))


def test_stopping_and_resuming_at_a_depth():
    model, bridge, tokens, logits = build("plain")
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, LOOPS, names_filter="blocks.1.hook_resid_pre@1")
        residual = bridge(tokens, stop_at_layer=3)
        close(residual, rec["blocks.1.hook_resid_pre@1"])
        close(visible(bridge(residual, start_at_layer=3)), visible(logits))


def test_no_hook_point_is_a_trap():
    """Every hook point fires, without flags or with the flag that TransformerLens has for it."""
    _, bridge, tokens, _ = fresh("everything")
    flags = {name: getattr(bridge, f"set_use_{name}") for name in ("split_qkv_input", "attn_result", "hook_mlp_in",
                                                                   "attn_in")}
    fired: set[str] = set()
    for on in ((), ("split_qkv_input", "attn_result", "hook_mlp_in"), ("attn_in",)):
        for name, switch in flags.items():
            switch(False) if name not in on else None
        for name in on:
            flags[name](True)
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(tokens)
        fired |= set(cache)
        close(visible(logits), visible(fresh("everything")[3]))
    assert fired == set(bridge.hook_dict)


def test_weights_in_transformerlens_shapes(variant, caplog):
    """Stacked over depths, each layer's the looped model's; and a state dict goes out and in."""
    model, bridge, tokens, logits = fresh(variant)
    topology, heads = model.config.topology(LOOPS), model.config.n_heads
    circuits = bridge.OV, bridge.QK
    assert not caplog.records     # TransformerLens warns if it takes something else for a layer
    assert all(circuit.shape[:2] == (topology.depth, heads) for circuit in circuits)
    for depth, (layer, _) in enumerate(topology.unrolled()):
        q, k, v = model.blocks[layer].attn.qkv.weight.view(3, heads, model.config.d_head, -1)
        for stacked, part in ((bridge.W_Q, q), (bridge.W_K, k), (bridge.W_V, v)):
            assert torch.equal(stacked[depth], part.transpose(1, 2))
    with torch.no_grad():
        saved = {key: value.clone() for key, value in bridge.state_dict().items()}
        for parameter in model.parameters():
            parameter.mul_(1.3)
        bridge.load_state_dict(saved)
        close(visible(model(tokens, LOOPS, t=0.4 if variant in BY_EXAMPLE else None)), visible(logits))


def test_a_deep_copy_is_independent():
    _, bridge, tokens, logits = build("time-constant")
    twin = copy.deepcopy(bridge)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.2)
        close(visible(bridge(tokens)), visible(logits))
        close(visible(twin(tokens)), visible(twin.original_model.looped(tokens, LOOPS)))


# ---------------------------------------------------------------- plug-in, and what is refused

@pytest.mark.slow
def test_transformerlens_finds_the_architecture_through_its_entry_point(tmp_path):
    """In a process that never imports hooks itself; an installed loopscope brings the same metadata."""
    root = Path(__file__).resolve().parents[2]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = project["entry-points"]["transformer_lens.architectures"]
    path = [str(root)]
    if not any(e.name == ARCHITECTURE for e in entry_points(group="transformer_lens.architectures")):
        metadata = tmp_path / "loopscope_plugin-0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: loopscope-plugin\nVersion: 0\n")
        lines = [f"{name} = {target}" for name, target in declared.items()]
        (metadata / "entry_points.txt").write_text("\n".join(["[transformer_lens.architectures]", *lines]) + "\n")
        path.append(str(tmp_path))
    code = f"""
import warnings
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory as Factory
with warnings.catch_warnings():
    warnings.simplefilter("error")
    Factory.discover_entry_points()
adapter = Factory._adapters[{ARCHITECTURE!r}]
from hooks.bridges.tl_adapter import register
register()
assert Factory._adapters[{ARCHITECTURE!r}] is adapter
print(adapter.__module__, adapter.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(path)}, cwd=tmp_path)
    assert done.stdout.split() == [LoopMDMArchitectureAdapter.__module__, LoopMDMArchitectureAdapter.__name__]
    small_model().unroll(2)
    assert ArchitectureAdapterFactory._adapters[ARCHITECTURE] is LoopMDMArchitectureAdapter


def test_weight_processing_is_refused_and_leaves_the_bridge_whole():
    _, bridge, tokens, logits = fresh("plain")
    with pytest.raises(ValueError, match=r"these weights are shared"):
        bridge.enable_compatibility_mode()
    assert not bridge.compatibility_mode
    with torch.no_grad():
        close(visible(bridge(tokens)), visible(logits))
    with pytest.raises(ValueError, match=r"these weights are shared"):
        bridge.process_weights()
    with torch.no_grad():
        close(visible(bridge(tokens)), visible(logits))


def test_what_transformerlens_refuses_for_a_bidirectional_denoiser():
    _, bridge, tokens, _ = build("plain")
    with pytest.raises(NotImplementedError, match=r"does not support TransformerBridge's shifted causal loss"):
        bridge(tokens, return_type="loss")
    with pytest.raises(NotImplementedError, match=r"generat"):
        bridge.generate(tokens, max_new_tokens=2)
    with pytest.raises(NotImplementedError, match=r"has no native sampler"):
        bridge.diffusion_generate(tokens)
    with pytest.raises(ValueError, match=r"requires a causal decoder-only Bridge"):
        JacobianLens.fit(bridge, ["a prompt"], corpus="test")


def test_wrong_arguments_are_named():
    model = small_model()
    with pytest.raises(ValueError, match=r"t has no effect"):
        model.unroll(2, t=0.5)
    with pytest.raises(ValueError, match=r"n_loops must be a whole number"):
        model.unroll(0)
    bridge = model.unroll(2)
    with pytest.raises(ValueError, match=r"attention_mask must be all ones"):
        bridge(small_tokens(), attention_mask=torch.zeros(3, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"positions, the model takes at most"):
        bridge(small_tokens(pos=11))
    timed = small_model(time_conditioning="t").unroll(2, t=0.3)
    with pytest.raises(ValueError, match=r"unrolled at t=0\.3: unroll again"):
        timed(small_tokens(), t=0.5)
    injecting = small_model(input_injection="add").unroll(3)
    with torch.no_grad():
        residual = injecting(small_tokens(), stop_at_layer=3)
        with pytest.raises(ValueError, match=r"start_at_layer=3 cannot be used here: .* adds the token embedding"):
            injecting(residual, start_at_layer=3)


def test_starting_where_the_heads_output_is_not_known_is_refused():
    model = small_model(input_injection="head", n_head_layers=2)
    bridge, tokens = model.unroll(3), small_tokens()
    with torch.no_grad():
        whole = bridge(tokens)
        for layer in (1, 6):   # in the head, and at the last loop, whose injection is behind it
            torch.testing.assert_close(bridge(bridge(tokens, stop_at_layer=layer), start_at_layer=layer), whole)
        for layer in (2, 4, 5):
            with pytest.raises(ValueError, match=rf"start_at_layer={layer} cannot be used .* adds the head's output"):
                bridge(bridge(tokens, stop_at_layer=layer), start_at_layer=layer)
