"""Looped models that nobody here trained: of transformers, drawn at random, and pretrained ones that `loopify` loops.

    found, missing = other_subjects("runs/specimens")         # missing: {"AntiBERTy …": how to get it}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooks import LoopedModel, adopt, loopify
from studies.questions.stage_test.subjects import Examples, Subject

VOCAB, LENGTH, MASK = 50, 24, 4
"""Tokens, positions and the mask token of models that were drawn at random."""
LOOPS = 4
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
"""Attention that returns its weights."""
SHARE_MASKED = 0.3

LOOPED, TIMES = (3, 4), 3
"""AntiBERTy's layers that are looped, and how often."""
CHAINS = (
    "EVQLVQSGPEVKKPGTSVKVSCKASGFTFMSSAVQWVRQARGQRLEWIGWIVIGSGNTNYAQKFQERVTITRDMSTSTAYMELSSLRSEDTAVYYCAAPYCSSISCNDGFDI",
    "DVVMTQTPFSLPVSLGDQASISCRSSQSLVHSNGNTYLHWYLQKPGQSPKLLIYKVSNRFSGVPDRFSGSGSGTDFTLKISRVEAEDLGVYFCSQSTHVPYTFGGGTKLEI")
"""Two antibody chains (heavy, light); examples are their first residues under many masks."""
RESIDUES = 40


def other_subjects(specimens: str | Path) -> tuple[list[Subject], dict[str, str]]:
    """Subjects that can be tested here, and what is missing for the others: {name: how to get it}."""
    found = [
        Subject("ALBERT", "untrained", f"AlbertForMaskedLM of transformers, drawn at random, its layer {LOOPS} times",
                _albert, _random_tokens, n_loops=LOOPS, identity="1"),
        Subject("HRM-Text", "untrained", "HrmTextForCausalLM of transformers, drawn at random, its L stack in "
                f"{LOOPS} slow cycles", _hrm_text, _random_next_tokens, n_loops=LOOPS, identity="1")]
    folder, missing = Path(specimens) / "antiberty" / "trained_models", {}
    if (folder / "AntiBERTy_md_smooth" / "pytorch_model.bin").is_file():
        first, last = LOOPED
        found.append(Subject("AntiBERTy", "foreign", f"a pretrained BERT for antibodies, layers {first} and {last} run "
                             f"{TIMES} times without training", partial(_antiberty, folder),
                             partial(_masked_chains, folder), n_loops=TIMES, identity="0.1.3"))
    else:
        missing["AntiBERTy"] = "`make specimens` downloads it (97 MB)"
    return found, missing


# ------------------------------------------------------------------------ drawn at random

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


# -------------------------------------------------------------------------- pretrained

def _antiberty(folder: Path) -> list[LoopedModel]:
    from transformers import BertConfig, BertForMaskedLM

    files = folder / "AntiBERTy_md_smooth"
    known = set(BertConfig().to_dict()) - {"architectures", "model_type", "transformers_version"}
    settings: dict[str, Any] = json.loads((files / "config.json").read_text())
    bert = BertForMaskedLM(BertConfig(**{key: value for key, value in settings.items() if key in known},
                                      **EAGER))
    state = torch.load(files / "pytorch_model.bin", map_location="cpu", weights_only=True)
    if missing := bert.load_state_dict(state, strict=False).missing_keys:
        raise ValueError(f"{files} lacks the weights {', '.join(missing)}: `make specimens` downloads them again.")
    loopify(bert.eval(), LOOPED, TIMES)
    return [adopt(bert, tokenizer=_Residues(folder))]


class _Residues:
    """The package's vocabulary: one token per residue."""

    def __init__(self, folder: Path) -> None:
        self.names = (folder / "vocab.txt").read_text().split()
        self.mask_token_id = self.names.index("[MASK]")


def _masked_chains(folder: Path, n: int, seed: int, levels: Sequence[float]) -> Examples:
    residues, generator = _Residues(folder), torch.Generator().manual_seed(seed)
    chains = torch.tensor([[residues.names.index(name) for name in ("[CLS]", *chain[:RESIDUES], "[SEP]")]
                           for chain in CHAINS])
    clean = chains[torch.arange(n) % len(chains)]
    masked = torch.rand(clean.shape, generator=generator) < SHARE_MASKED
    masked[:, [0, -1]] = False
    masked[:, 1] = True
    return Examples(clean.masked_fill(masked, residues.mask_token_id), clean, masked, None)
