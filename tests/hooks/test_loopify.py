"""loopify: the loops are the block run by hand; one loop is the original to the bit; caches agree with none; undone."""

from __future__ import annotations

import pytest
import torch

from hooks.foreign.loopify import loopify
from hooks.foreign.schedules import schedule_of
from hooks.foreign.watching import watch


def ids(batch: int = 2, pos: int = 7) -> torch.Tensor:
    return torch.randint(3, 50, (batch, pos), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
                                        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                                        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0)).eval()


@pytest.fixture(scope="module")
def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
                                num_attention_heads=4, max_position_embeddings=64, initializer_range=0.3)).eval()


def run_llama(model, tokens, order, mask):
    """Llama's forward written out, with its layers in ``order``; the output of every step."""
    inner = model.model
    x = inner.embed_tokens(tokens)
    positions = torch.arange(tokens.shape[1])[None]
    rotary, seen = inner.rotary_emb(x, positions), []
    for layer in order:
        x = inner.layers[layer](x, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
        seen.append(x)
    return model.lm_head(inner.norm(x)), seen


@torch.no_grad()
def test_looping_llama_is_running_its_block_again(llama):
    tokens = ids()
    order = [0, 1, 2, 3, 1, 2, 3, 1, 2, 3, 4]
    expected, seen = run_llama(llama, tokens, order, None)
    with loopify(llama, layers=(1, 3), n_loops=3), watch(llama, "model.layers.?.hook_out") as rec:
        logits = llama(tokens, use_cache=False).logits
    assert torch.equal(logits, expected)
    firing = iter(seen)
    assert torch.equal(rec["model.layers.0.hook_out"], next(firing))
    for k in range(3):
        for layer in (1, 2, 3):
            assert torch.equal(rec[f"model.layers.{layer}.hook_out@{k}"], next(firing)), (layer, k)
    assert torch.equal(rec["model.layers.4.hook_out"], next(firing))
    assert not torch.equal(logits, llama(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("block", [(0, 0), (2, 3), (0, 4), (4, 4)])
def test_one_loop_is_the_original_to_the_bit_and_removal_restores_it(llama, block):
    tokens = ids()
    state, plain = {k: v.clone() for k, v in llama.state_dict().items()}, llama(tokens).logits
    with loopify(llama, layers=block, n_loops=1):
        assert torch.equal(llama(tokens).logits, plain)
    with loopify(llama, layers=block, n_loops=2):
        assert not torch.equal(llama(tokens).logits, plain)
        assert llama.state_dict().keys() == state.keys()
    assert torch.equal(llama(tokens).logits, plain)
    assert schedule_of(llama) is None
    assert all(torch.equal(value, state[key]) for key, value in llama.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in llama.modules())


@torch.no_grad()
def test_looping_an_encoder_keeps_its_padding_mask(bert):
    tokens = ids()
    mask = torch.ones_like(tokens)
    mask[1, 4:] = 0
    with loopify(bert, layers=(1, 2), n_loops=3), watch(bert, "encoder.layer.?.hook_out") as rec:
        out = bert(tokens, attention_mask=mask).last_hidden_state
        cut = bert(tokens[1:, :4]).last_hidden_state
    torch.testing.assert_close(out[1:, :4], cut)  # padding is ignored in every loop
    x = rec["encoder.layer.0.hook_out"]
    for k in range(3):
        for layer in (1, 2):
            x = bert.encoder.layer[layer](x)
            assert torch.equal(rec[f"encoder.layer.{layer}.hook_out@{k}"], x)


@torch.no_grad()
def test_an_edit_in_one_loop_reaches_only_what_follows(llama):
    tokens = ids()
    with loopify(llama, layers=(1, 2), n_loops=3):
        with watch(llama, "model.layers.?.hook_out") as before:
            llama(tokens)
        with watch(llama, "model.layers.?.hook_out",
                   fwd_hooks=[("model.layers.2.hook_out@0", lambda x, hook: x + 1)]) as after:
            llama(tokens)
    changed = {site for site in before if not torch.equal(before[site], after[site])}
    assert changed == {"model.layers.2.hook_out@0", "model.layers.1.hook_out@1", "model.layers.2.hook_out@1",
                       "model.layers.1.hook_out@2", "model.layers.2.hook_out@2", "model.layers.3.hook_out",
                       "model.layers.4.hook_out"}


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_with_a_cache_agrees_with_generation_without(llama, beams):
    tokens = ids(pos=5)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "pad_token_id": 0,
               "attention_mask": torch.ones_like(tokens)}
    with loopify(llama, layers=(1, 3), n_loops=3):
        assert torch.equal(llama.generate(tokens, use_cache=True, **options),
                           llama.generate(tokens, use_cache=False, **options))
        first = llama(tokens, use_cache=True)
        second = llama(tokens[:, :1], past_key_values=first.past_key_values)
        whole = llama(torch.cat([tokens, tokens[:, :1]], 1), use_cache=False)
    torch.testing.assert_close(second.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_each_forward_of_generation_is_recorded(llama):
    tokens, seen, name = ids(pos=5), [], "model.layers.3.hook_out"
    with (loopify(llama, layers=(1, 3), n_loops=2),
          watch(llama, name, on_forward=lambda rec: seen.append(rec.stack(name)))):
        llama.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0,
                       attention_mask=torch.ones_like(tokens))
    assert [tuple(stack.shape) for stack in seen] == [(2, 2, 5, 32), (2, 2, 1, 32), (2, 2, 1, 32)]


@torch.no_grad()
def test_a_static_cache_is_refused(llama):
    from transformers import StaticCache

    with (loopify(llama, layers=(1, 2), n_loops=2),
          pytest.raises(ValueError, match=r"keep their keys and values in a StaticCache .*: pass use_cache=False")):
        llama(ids(), past_key_values=StaticCache(config=llama.config, max_cache_len=16))
    llama(ids())


def test_gradients_flow_through_every_loop(llama):
    tokens = ids()
    with (loopify(llama, layers=(1, 1), n_loops=3),
          watch(llama, "model.layers.1.hook_out", gradients=True) as rec):
        llama(tokens, use_cache=False).logits.square().sum().backward()
    llama.zero_grad()
    _, seen = run_llama(llama, tokens, [0, 1, 1, 1, 2, 3, 4], None)
    logits = llama.lm_head(llama.model.norm(seen[-1]))
    expected = torch.autograd.grad(logits.square().sum(), seen[1:4])
    for k in range(3):
        torch.testing.assert_close(rec.gradients[f"model.layers.1.hook_out@{k}"], expected[k], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layers", "n_loops", "message"), [
    ((3, 5), 2, r"layers=\(3, 5\) is not a block of model\.layers, whose layers are 0\.\.4"),
    ((3, 2), 2, r"layers=\(3, 2\) is not a block"),
    ((1, 2), 0, "n_loops must be a whole number of at least 1, not 0"),
])
def test_blocks_that_do_not_exist_are_refused(llama, layers, n_loops, message):
    with pytest.raises(ValueError, match=message):
        loopify(llama, layers=layers, n_loops=n_loops)


def test_a_model_is_looped_once_at_a_time_and_its_stack_must_be_known(llama):
    with loopify(llama, layers=(1, 2), n_loops=2), pytest.raises(ValueError, match="loopified already: call remove"):
        loopify(llama, layers=(1, 2), n_loops=2)
    with pytest.raises(ValueError, match=r"no ModuleList at 'layers'; it has model\.layers"):
        loopify(llama, layers=(1, 2), n_loops=2, stack="layers")
    two = torch.nn.ModuleDict({"a": torch.nn.ModuleList([torch.nn.Linear(2, 2)]),
                               "b": torch.nn.ModuleList([torch.nn.Linear(2, 2)])})
    with pytest.raises(ValueError, match=r"which layers\? stack= should be one of: a, b"):
        loopify(two, layers=(0, 0), n_loops=2)
