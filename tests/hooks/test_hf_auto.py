"""transformers' Auto classes read and write the same folders; TransformerLens boots what they load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from hooks import HookedLoopMDM
from hooks.bridges.hf import LoopMDMForMaskedLM, LoopMDMPretrainedConfig
from tests.small import VARIANTS, small_model, small_tokens


@pytest.fixture(params=["plain", "groups", "everything"])
def folder(request, tmp_path):
    model = small_model(**VARIANTS[request.param])
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_auto_classes_load_a_zoo_folder(folder):
    model, path = folder
    config = AutoConfig.from_pretrained(path)
    assert isinstance(config, LoopMDMPretrainedConfig)
    assert config.to_loopmdm() == model.config
    assert (config.num_hidden_layers, config.hidden_size) == (model.config.topology().depth, model.config.d_model)
    tokens = small_tokens()
    with torch.no_grad():
        expected = model(tokens, 3, t=0.6 if model.config.conditioned else None)
        for auto in (AutoModelForMaskedLM, AutoModel):
            loaded = auto.from_pretrained(path)
            assert isinstance(loaded, LoopMDMForMaskedLM)
            assert not loaded.training
            got = loaded(input_ids=tokens, n_loops=3, t=0.6 if model.config.conditioned else None)
            assert torch.equal(got.logits, expected)
    _, rec = loaded.model.run_with_cache(tokens, 3, names_filter="blocks.1.hook_resid_post")
    assert len(rec) == 3


def test_saving_gives_the_same_folder_back(folder, tmp_path):
    model, path = folder
    AutoModelForMaskedLM.from_pretrained(path).save_pretrained(tmp_path / "again")
    again = HookedLoopMDM.from_pretrained(tmp_path / "again")
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
    assert (tmp_path / "again" / "config.json").read_text() == (path / "config.json").read_text()


def test_a_folder_without_transformers_keys_still_loads(folder):
    """Models saved before the folder named its type; transformers needs the wrapper's own class then."""
    model, path = folder
    values = json.loads((path / "config.json").read_text())
    assert (values.pop("model_type"), values.pop("architectures")) == ("loopmdm", ["LoopMDMForMaskedLM"])
    (path / "config.json").write_text(json.dumps(values))
    tokens = small_tokens()
    with torch.no_grad():
        assert torch.equal(HookedLoopMDM.from_pretrained(path)(tokens), model(tokens))
        assert torch.equal(LoopMDMForMaskedLM.from_pretrained(path)(tokens).logits, model(tokens))


def test_labels_and_tuples():
    wrapped = LoopMDMForMaskedLM(LoopMDMPretrainedConfig(**small_model().config.to_dict()))
    wrapped.model = small_model()
    tokens = small_tokens()
    labels = torch.where(tokens == 6, torch.full_like(tokens, 2), -100)
    out = wrapped(tokens, labels=labels)
    keep = labels != -100
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[keep], labels[keep]))
    loss, logits = wrapped(tokens, labels=labels, return_dict=False)
    assert torch.equal(loss, out.loss)
    assert torch.equal(logits, out.logits)


def test_padding_reaches_the_model(folder):
    model, path = folder
    loaded = AutoModelForMaskedLM.from_pretrained(path)
    tokens, mask = small_tokens(), torch.ones(3, 9, dtype=torch.long)
    mask[1, 5:] = 0
    with torch.no_grad():
        assert torch.equal(loaded(tokens, mask, n_loops=2).logits, model(tokens, 2, attention_mask=mask))
        torch.testing.assert_close(loaded(tokens, attention_mask=mask, n_loops=2).logits[1:2, :5],
                                   loaded(tokens[1:2, :5], n_loops=2).logits)
        assert torch.equal(loaded(tokens, torch.ones(3, 9), n_loops=2).logits, model(tokens, 2))


def test_a_model_from_a_configuration_alone():
    config = LoopMDMPretrainedConfig(**small_model().config.to_dict())
    torch.manual_seed(3)
    first = AutoModelForMaskedLM.from_config(config)
    assert first.model.config == small_model().config
    assert first.model.embed.weight.std() > 0.5     # LoopMDM's own initialisation, unit scale
    assert not first.model.unembed_weight.any()


@pytest.mark.parametrize("n_loops", [None, 2])
def test_transformerlens_boots_the_folder(folder, n_loops):
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    from hooks.bridges.tl_adapter import register

    model, path = folder
    register()
    words = Tokenizer(models.WordLevel({str(i): i for i in range(7)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="5", eos_token="5", mask_token="6")
    depth = model.config.topology(n_loops).depth
    bridge = TransformerBridge.boot_transformers(str(path), device="cpu", tokenizer=tokenizer,
                                                 hf_config_overrides={"num_hidden_layers": depth})
    tokens = small_tokens()
    assert bridge.cfg.n_layers == len(bridge.blocks) == depth
    with torch.no_grad():
        torch.testing.assert_close(bridge(tokens), model(tokens, n_loops), rtol=1e-4, atol=1e-4)
        _, cache = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_resid_post"))
    assert len(cache) == depth


def test_a_depth_that_no_number_of_loops_has(folder):
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    from hooks.bridges.tl_adapter import ARCHITECTURE, register

    model, path = folder
    register()
    loaded = AutoModelForMaskedLM.from_pretrained(path)
    loaded.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match=r"num_hidden_layers=5 is not the depth of this model for any number of loops"):
        build_bridge_from_module(loaded, ARCHITECTURE, hf_config=loaded.config)
    loaded.config.num_hidden_layers = model.config.topology(2).depth
    bridge = build_bridge_from_module(loaded, ARCHITECTURE, hf_config=loaded.config)
    with pytest.raises(ValueError, match=r"unrolled to 2 loops and runs only those"):
        bridge.original_model(small_tokens(), n_loops=3)
    with pytest.raises(ValueError, match=r"save the one it was made from"):
        loaded.save_pretrained(path)


def test_refusals(folder):
    _, path = folder
    loaded = AutoModelForMaskedLM.from_pretrained(path)
    with pytest.raises(ValueError, match=r"example 0 is padding alone: leave it out of the batch"):
        loaded(small_tokens(), attention_mask=torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"pass input_ids, not inputs_embeds"):
        loaded(inputs_embeds=torch.zeros(3, 9, 16))
    (path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        AutoModelForMaskedLM.from_pretrained(path)


def test_transformers_is_imported_only_when_asked_for():
    code = ("import sys, hooks, hooks.bridges.unroll, hooks.bridges.interop, hooks.bridges.checkpoints; "
            "print([m for m in ('transformers', 'transformer_lens') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
