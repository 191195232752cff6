"""Looped models that nobody here trained: architectures of transformers drawn at random, and pretrained models.

    found, missing = other_subjects("runs/specimens")         # missing: {"AntiBERTy": how to get it}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooks import LoopedModel, adopt
from studies.questions.stage_test.pretrained import pretrained_subjects
from studies.questions.stage_test.subjects import Examples, Subject

VOCAB, LENGTH, MASK = 50, 24, 4
"""Tokens, positions and the mask token of models that were drawn at random."""
LOOPS = 4
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
"""Attention that returns its weights."""
SHARE_MASKED = 0.3


def other_subjects(specimens: str | Path) -> tuple[list[Subject], dict[str, str]]:
    """Subjects that can be tested here, and what is missing for the others: {name: how to get it}."""
    random = [
        Subject("ALBERT", "untrained", f"AlbertForMaskedLM of transformers, drawn at random, its layer {LOOPS} times",
                _albert, _random_tokens, n_loops=LOOPS, identity="1"),
        Subject("HRM-Text", "untrained", "HrmTextForCausalLM of transformers, drawn at random, its L stack in "
                f"{LOOPS} slow cycles", _hrm_text, _random_next_tokens, n_loops=LOOPS, identity="1")]
    pretrained, missing = pretrained_subjects(specimens)
    return [*random, *pretrained], missing


# ------------------------------------------------------------------------------ private

class _MaskOnly:
    mask_token_id = MASK


def _albert() -> list[LoopedModel]:
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(vocab_size=VOCAB, embedding_size=32, hidden_size=64, num_attention_heads=4, pad_token_id=0,
                          intermediate_size=128, num_hidden_layers=LOOPS, **EAGER)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [adopt(AlbertForMaskedLM(config).eval(), tokenizer=_MaskOnly())]


def _hrm_text() -> list[LoopedModel]:
    from transformers import HrmTextConfig, HrmTextForCausalLM

    config = HrmTextConfig(vocab_size=VOCAB, hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=128,
                           num_layers_per_stack=2, H_cycles=LOOPS, L_cycles=2, **EAGER)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [adopt(HrmTextForCausalLM(config).eval())]


def _clean(n: int, seed: int) -> tuple[Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(MASK + 1, VOCAB, (n, LENGTH), generator=generator), generator


def _random_tokens(n: int, seed: int, levels: Sequence[float]) -> Examples:
    clean, generator = _clean(n, seed)
    masked = torch.rand(clean.shape, generator=generator) < SHARE_MASKED
    masked[:, 0] = True
    return Examples(clean.masked_fill(masked, MASK), clean, masked, None)


def _random_next_tokens(n: int, seed: int, levels: Sequence[float]) -> Examples:
    clean, _ = _clean(n, seed)
    targets = clean.roll(-1, 1)
    scored = torch.ones_like(clean, dtype=torch.bool)
    scored[:, -1] = False
    return Examples(clean, targets, scored, None)
