"""Looped models of every make, small and random, as `adopt` brings them to the contract: what the tests share.

    specimen = SPECIMENS["albert"]()
    specimen.model, specimen.inputs, specimen.targets, specimen.n_loops
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hooks import LoopedModel, adopt, loopify
from tests.small import MASK, small_model, small_tokens

VOCAB, N_LOOPS = 50, 4


@dataclass
class Specimen:
    """A model, what to run it on, and clean tokens where the inputs do not hold the answers themselves."""

    model: LoopedModel
    inputs: Any
    n_loops: int
    targets: Tensor | None = None
    attention: bool = True    # does it make patterns?


class Tokenizer:
    """As much of a tokenizer as a model is scored and named by."""

    mask_token_id = 3

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"⟨{i}⟩" for i in ids]


class Mine(nn.Module):
    """A looped model as anyone would write it: attention that returns its pattern, input added at each loop."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        self.block = MyBlock()

    def forward(self, tokens: Tensor, n_loops: int = 4) -> Tensor:
        x = embedded = self.embed(tokens)
        for _ in range(n_loops):
            x = self.block(x + embedded)
        return self.unembed(x)


class MyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        z, _ = self.attn(x, x, x, average_attn_weights=False)
        x = x + z
        return x + self.mlp(x)


def loopmdm() -> Specimen:
    tokens = small_tokens(batch=6)
    return Specimen(small_model(), tokens, N_LOOPS, tokens.masked_fill(tokens == MASK, 1))


def albert() -> Specimen:
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(vocab_size=VOCAB, embedding_size=16, hidden_size=32, num_attention_heads=2, pad_token_id=0,
                          intermediate_size=64, num_hidden_layers=N_LOOPS, attn_implementation="eager")
    return _masked(adopt(AlbertForMaskedLM(config).eval(), tokenizer=Tokenizer()), N_LOOPS)


def hrm_text() -> Specimen:
    from transformers import HrmTextConfig, HrmTextForCausalLM

    config = HrmTextConfig(vocab_size=VOCAB, hidden_size=32, num_attention_heads=2, head_dim=16, intermediate_size=64,
                           num_layers_per_stack=2, H_cycles=3, L_cycles=2, attn_implementation="eager")
    return Specimen(adopt(HrmTextForCausalLM(config).eval()), _tokens(), 3)


def loopified_bert() -> Specimen:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=5, num_attention_heads=2,
                        intermediate_size=64, attn_implementation="eager")
    bert = BertForMaskedLM(config).eval()
    loopify(bert, (1, 2), 3)
    return _masked(adopt(bert, tokenizer=Tokenizer()), 3)


def bridge() -> Specimen:
    """A LoopMDM unrolled for TransformerLens: each layer once."""
    tokens = small_tokens(batch=6)
    adopted = adopt(small_model().unroll(N_LOOPS), tokenizer=type("Mask", (), {"mask_token_id": MASK})())
    return Specimen(adopted, tokens, 1, tokens.masked_fill(tokens == MASK, 1))


def own_module() -> Specimen:
    model = adopt(Mine().eval(), layers=["block"], n_loops=4, attention="attn", tokenizer=Tokenizer())
    return _masked(model, 4)


def positions_first() -> Specimen:
    """torch's own encoder layer in its default layout [pos, batch, d_model], looped by hand."""
    model = adopt(PositionsFirst().eval(), layers=["layer"], n_loops=3, axes=("pos", "batch", "d_model"))
    tokens = _tokens()
    return Specimen(model, tokens.T.contiguous(), 3, tokens, attention=False)


def without_positions() -> Specimen:
    """A state [batch, d_model], read by a function of it."""
    states = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))
    model = adopt(WithoutPositions().eval(), layers=["step"], n_loops=3, readout=lambda state: state[..., :5])
    return Specimen(model, states, 3, torch.zeros(6, 1, dtype=torch.long), attention=False)


class PositionsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(VOCAB, 16), nn.Linear(16, VOCAB)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for _ in range(3):
            x = self.layer(x)
        return self.unembed(x)


class WithoutPositions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Sequential(nn.Linear(16, 16), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.step(x)
        return x


def _tokens() -> Tensor:
    return torch.randint(4, VOCAB, (6, 7), generator=torch.Generator().manual_seed(0))


def _masked(model: LoopedModel, n_loops: int) -> Specimen:
    clean = _tokens()
    masked = clean.clone()
    masked[:, 2], masked[::2, 5] = Tokenizer.mask_token_id, Tokenizer.mask_token_id
    return Specimen(model, masked, n_loops, clean)


SPECIMENS: dict[str, Callable[[], Specimen]] = {
    "loopmdm": loopmdm, "albert": albert, "hrm-text": hrm_text, "loopified-bert": loopified_bert, "bridge": bridge,
    "own-module": own_module, "positions-first": positions_first, "without-positions": without_positions,
}
