"""Lightning checkpoints of the MDLM lineage, against an independent implementation of their transformer."""

from __future__ import annotations

import math
import pickle
import sys
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hooks.bridges.checkpoints import from_dit_state, load_checkpoint
from hooks.topology import Topology

VOCAB, WIDTH, HEADS, COND, BLOCKS, LENGTH = 11, 16, 2, 12, 5, 8
TOPOLOGY = Topology(n_head=1, n_mid=2, n_tail=2, n_loops=4)


class LayerNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        half = torch.arange(0, WIDTH // HEADS, 2).float()
        self.register_buffer("inv_freq", 1.0 / 10_000 ** (half / (WIDTH // HEADS)))


class DDiTBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1 = LayerNorm()
        self.attn_qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attn_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm2 = LayerNorm()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH))
        self.adaLN_modulation = nn.Linear(COND, 6 * WIDTH)

    def forward(self, x, c, inv_freq):
        batch, length, _ = x.shape
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, dim=2)
        qkv = self.attn_qkv(self.norm1(x) * (1 + scale1) + shift1).view(batch, length, 3, HEADS, -1)
        turned = torch.polar(torch.ones(()), torch.outer(torch.arange(length).float(), inv_freq))[:, None]
        half = qkv.shape[-1] // 2

        def rotate(v):                     # as complex numbers: pairs (i, i + half) turn by the same angle
            z = torch.complex(v[..., :half], v[..., half:]) * turned
            return torch.cat([z.real, z.imag], -1)

        q, k, v = rotate(qkv[:, :, 0]), rotate(qkv[:, :, 1]), qkv[:, :, 2]
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(math.sqrt(2 * half)).softmax(-1)
        x = x + gate1 * self.attn_out(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, -1))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Holder(nn.Module):
    """A module with the given children, for the checkpoint's nesting of names."""

    def __init__(self, **children):
        super().__init__()
        for name, child in children.items():
            setattr(self, name, child)


class DiT(nn.Module):
    """The backbone, with a schedule that says which block follows which."""

    def __init__(self, seed=0):
        super().__init__()
        self.vocab_embed = Holder(embedding=nn.Parameter(torch.zeros(VOCAB, WIDTH)))
        self.sigma_map = Holder(mlp=nn.Sequential(nn.Linear(256, COND), nn.SiLU(), nn.Linear(COND, COND)))
        self.rotary_emb = Rotary()
        self.blocks = nn.ModuleList(DDiTBlock() for _ in range(BLOCKS))
        self.output_layer = Holder(norm_final=LayerNorm(), linear=nn.Linear(WIDTH, VOCAB),
                                   adaLN_modulation=nn.Linear(COND, 2 * WIDTH))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.25)

    def forward(self, tokens, sigma, schedule):
        angles = sigma[:, None] * torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        c = nn.functional.silu(self.sigma_map.mlp(torch.cat([angles.cos(), angles.sin()], -1)))
        x = self.vocab_embed.embedding[tokens]
        for block in schedule:
            x = self.blocks[block](x, c, self.rotary_emb.inv_freq)
        shift, scale = self.output_layer.adaLN_modulation(c)[:, None].chunk(2, dim=2)
        return self.output_layer.linear(self.output_layer.norm_final(x) * (1 + scale) + shift)


def schedule(loops):
    return [0, *[1, 2] * loops, 3, 4]


def lightning(model, average, config=None):
    """The file's content, as Lightning and the lineage's EMA write it."""
    return {
        "epoch": 3, "global_step": 1000, "pytorch-lightning_version": "2.2.1",
        "state_dict": {f"backbone.{name}": value for name, value in model.state_dict().items()},
        "ema": {"decay": 0.9999, "num_updates": 1000,
                "shadow_params": [p.detach().clone() for p in average.parameters()]},
        "hyper_parameters": {"config": {"model": {"n_heads": HEADS, "length": LENGTH, "hidden_size": WIDTH},
                                        "time_conditioning": False} if config is None else config},
    }


def close(got, expected):
    """Up to the mask's logit, which a LoopMDM holds down: the last token, unless said otherwise."""
    torch.testing.assert_close(got[..., :-1], expected[..., :-1], rtol=1e-4, atol=1e-5)
    assert (got[..., -1] < -1e4).all()


@pytest.fixture
def tokens():
    return torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def written(tmp_path):
    model, average = DiT(0), DiT(1)
    torch.save(lightning(model, average), tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt", model, average


@pytest.mark.parametrize("loops", [1, 4, 6])
def test_logits_of_the_averaged_weights_at_any_number_of_loops(written, tokens, loops):
    path, model, average = written
    loaded = load_checkpoint(path, TOPOLOGY)
    assert (loaded.config.max_loops, loaded.config.n_heads, loaded.config.max_seq_len) == (4, HEADS, LENGTH)
    with torch.no_grad():
        zero = torch.zeros(3)
        close(loaded(tokens, loops), average(tokens, zero, schedule(loops)))
        close(load_checkpoint(path, TOPOLOGY, ema=False)(tokens, loops), model(tokens, zero, schedule(loops)))


@pytest.mark.parametrize("t", [0.1, 0.9])
def test_sigma_conditioning(tmp_path, tokens, t):
    model = DiT()
    config = {"model": {"n_heads": HEADS, "length": LENGTH}, "time_conditioning": True}
    torch.save(lightning(model, model, config), tmp_path / "timed.ckpt")
    loaded = load_checkpoint(tmp_path / "timed.ckpt", TOPOLOGY)
    with torch.no_grad():
        sigma = -torch.log(torch.full((3,), 1 - t))
        close(loaded(tokens, 2, t=t), model(tokens, sigma, schedule(2)))
        assert not torch.allclose(loaded(tokens, 2, t=t), loaded(tokens, 2, t=0.5), atol=1e-3)


def test_the_looped_places_are_the_callers_choice(written, tokens):
    path, _, average = written
    loaded = load_checkpoint(path, Topology(2, 1, 2, 3))
    with torch.no_grad():
        close(loaded(tokens, 3), average(tokens, torch.zeros(3), [0, 1, 2, 2, 2, 3, 4]))
        _, rec = loaded.run_with_cache(tokens, 3, names_filter="blocks.2.hook_resid_post")
    assert list(rec) == [f"blocks.2.hook_resid_post@{k}" for k in range(3)]


def test_a_loaded_model_becomes_a_folder(written, tokens, tmp_path):
    loaded = load_checkpoint(written[0], TOPOLOGY)
    loaded.save_pretrained(tmp_path / "zoo")
    again = type(loaded).from_pretrained(tmp_path / "zoo")
    with torch.no_grad():
        assert torch.equal(again(tokens, 3), loaded(tokens, 3))


@pytest.mark.parametrize("prefix", ["", "backbone.", "backbone._orig_mod."])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_bare_state_dict(tmp_path, tokens, prefix, suffix):
    model = DiT()
    path = tmp_path / f"bare{suffix}"
    state = {f"{prefix}{name}": value for name, value in model.state_dict().items()}
    (save_file if suffix == ".safetensors" else torch.save)(state, path)
    loaded = load_checkpoint(path, TOPOLOGY, n_heads=HEADS, max_seq_len=LENGTH, time_conditioning="constant")
    with torch.no_grad():
        close(loaded(tokens, 3), model(tokens, torch.zeros(3), schedule(3)))


def test_tied_embeddings_have_one_average_under_two_names(tmp_path, tokens):
    model, average = DiT(0), DiT(1)
    for dit in (model, average):
        dit.output_layer.linear.weight = dit.vocab_embed.embedding
    torch.save(lightning(model, average), tmp_path / "tied.ckpt")
    with torch.no_grad():
        loaded = load_checkpoint(tmp_path / "tied.ckpt", TOPOLOGY)
        close(loaded(tokens, 2), average(tokens, torch.zeros(3), schedule(2)))


# ------------------------------------------------------------------ what else is pickled

class Node:
    """Pickled as OmegaConf's nodes are: a state with _content, or with _val."""

    def __init__(self, state):
        self.__dict__.update(state)


class Trap:
    """Runs a command when unpickled without care."""

    def __reduce__(self):
        return exec, ("raise SystemExit('the checkpoint ran code')",)


def test_configuration_objects_are_read_without_their_classes(tmp_path, tokens, monkeypatch):
    module = types.ModuleType("omegaconf_of_somebody")
    module.DictConfig = type("DictConfig", (Node,), {"__module__": module.__name__})
    module.AnyNode = type("AnyNode", (Node,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def node(value):
        if isinstance(value, dict):
            return module.DictConfig({"_content": {key: node(item) for key, item in value.items()}, "_metadata": None})
        return module.AnyNode({"_val": value, "_parent": None})

    model = DiT()
    config = node({"model": {"n_heads": HEADS, "length": LENGTH}, "time_conditioning": False})
    torch.save(lightning(model, model, config), tmp_path / "omega.ckpt")
    monkeypatch.delitem(sys.modules, module.__name__)
    loaded = load_checkpoint(tmp_path / "omega.ckpt", TOPOLOGY)
    assert loaded.config.time_conditioning == "constant"
    with torch.no_grad():
        close(loaded(tokens, 2), model(tokens, torch.zeros(3), schedule(2)))


def test_nothing_in_a_checkpoint_runs(tmp_path):
    model = DiT()
    content = lightning(model, model)
    content["hyper_parameters"]["tokenizer"] = Trap()
    torch.save(content, tmp_path / "trap.ckpt")
    with pytest.raises(SystemExit):
        pickle.loads(pickle.dumps(Trap()))
    loaded = load_checkpoint(tmp_path / "trap.ckpt", TOPOLOGY)
    assert torch.equal(loaded.embed.weight, model.vocab_embed.embedding)


# ------------------------------------------------------------------ refusals

def broken(tmp_path, change):
    model = DiT()
    content = lightning(model, model)
    change(content)
    torch.save(content, tmp_path / "broken.ckpt")
    return tmp_path / "broken.ckpt"


@pytest.mark.parametrize(("change", "message"), [
    (lambda c: c["state_dict"].pop("backbone.blocks.3.mlp.0.bias") is None or c.pop("ema"),
     r"broken\.ckpt: blocks\.3\.mlp\.0\.bias is missing"),
    (lambda c: c["state_dict"].pop("backbone.output_layer.linear.bias") is None or c.pop("ema"),
     r"broken\.ckpt: output_layer\.linear\.bias is missing"),
    (lambda c: c["state_dict"].update({"backbone.blocks.0.attn_out.weight": torch.zeros(3, 3)}) or c.pop("ema"),
     r"broken\.ckpt: blocks\.0\.attn_out\.weight has shape \(3, 3\), the other tensors ask for \(16, 16\)"),
    (lambda c: c["state_dict"].update({"backbone.blocks.0.gate.weight": torch.zeros(1)}) or c.pop("ema"),
     r"broken\.ckpt: blocks\.0\.gate\.weight .* has no place in this architecture"),
    (lambda c: c["ema"]["shadow_params"].pop(), r"broken\.ckpt: ema holds \d+ averaged tensors for \d+ parameters; "),
    (lambda c: c["ema"]["shadow_params"].reverse(),
     r"broken\.ckpt: the averaged tensor for vocab_embed\.embedding has shape \(32,\)"),
    (lambda c: c["ema"].pop("shadow_params"), r"broken\.ckpt: ema has no shadow_params; pass ema=False"),
    (lambda c: c.pop("hyper_parameters"), r"n_heads cannot be read from the tensors"),
    (lambda c: c["hyper_parameters"]["config"].pop("time_conditioning"), r"pass time_conditioning='constant'"),
])
def test_refusals_name_file_and_tensor(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(broken(tmp_path, change), TOPOLOGY)


def test_other_refusals(written, tmp_path):
    path, model, _ = written
    with pytest.raises(ValueError, match=r"has 5 blocks, the topology 1 \+ 2 \+ 9 = 12: .*Topology\(1, 2, 2, 12\)"):
        load_checkpoint(path, Topology(1, 2, 9, 12))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt does not exist"):
        load_checkpoint(tmp_path / "nowhere.ckpt", TOPOLOGY)
    whole = path.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.ckpt cannot be read as a checkpoint"):
        load_checkpoint(tmp_path / "half.ckpt", TOPOLOGY)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt holds a list"):
        load_checkpoint(tmp_path / "list.pt", TOPOLOGY)
    ours = from_dit_state(model.state_dict(), TOPOLOGY, n_heads=HEADS, max_seq_len=LENGTH, time_conditioning="t")
    with pytest.raises(ValueError, match=r"These are LoopMDM's own names: load the folder with"):
        from_dit_state(ours.state_dict(), TOPOLOGY, n_heads=HEADS, max_seq_len=LENGTH)
