"""English: State of the Union speeches in BPE tokens or bytes, with what is known about each token.

Every position is free. The bundled text is 233 speeches (public domain); any folder of .txt
files does as well. Speeches are split into train and test by a hash of their names. Beside
the latents that need only the tokens (frequency, place in the word and in the sentence),
`visibility_latents` gives those that depend on the mask, and `studies.tasks.brown` human
part-of-speech tags of the Brown corpus.

    task = Text(length=64)
    print(task.decode(task.sample(1, seed=0).tokens[0]))   # "… the Congress of the United States …"
    Text(length=128, vocab=257)                            # characters: the BPE without merges
"""

from __future__ import annotations

import functools
import hashlib
import lzma
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from studies.tasks.contract import Batch, Latent, Task

DATA = Path(__file__).resolve().parent / "data"
SPECIAL = ("<end>",)
"""Tokens before the BPE's own: the end of a document."""
FREQUENCY_CLASSES = 8
"""Classes of the frequency latent: powers of four of the rank, the most frequent first."""
MAX_PLACE = 31
"""Places in a sentence that the latent tells apart; later ones count as this one."""
MASK_SIGN = "■"


@dataclass(frozen=True)
class Text(Task):
    """Windows of ``length`` tokens out of a corpus."""

    name: ClassVar[str] = "text"
    region_name: ClassVar[str] = "position"

    length: int = 128     # tokens in a window
    corpus: str = "sotu"  # the bundled speeches, or the path of a folder with .txt files
    vocab: int = 2048     # size of the bundled BPE, data/bpe<vocab>.json: 2048, or 257, which are single bytes
    train_tokens: int = 0  # of the training split, to be read in several epochs; 0 means all of it

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"length must be at least 2, not {self.length}.")
        if self.train_tokens and self.train_tokens <= self.length:
            raise ValueError(f"train_tokens must be 0, for all, or more than a window's {self.length}, "
                             f"not {self.train_tokens}.")

    @property
    def vocab_size(self) -> int:
        return tokenizer(self.vocab).get_vocab_size() + 1

    @property
    def seq_len(self) -> int:
        return self.length

    def sample(self, n: int, seed: int, split: str = "train") -> Batch:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {split!r}.")
        stream = _stream(self.corpus, self.vocab, split, self.train_tokens if split == "train" else 0)
        if len(stream) <= self.length:
            raise ValueError(f"the {split} split of {self.corpus!r} has {len(stream)} tokens, fewer than a window.")
        generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
        starts = torch.randint(0, len(stream) - self.length, (n,), generator=generator)
        tokens = stream[starts[:, None] + torch.arange(self.length)].long()
        return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))

    def latents(self, tokens: Int[Tensor, "example pos"],
                free: Bool[Tensor, "example pos"] | None = None) -> Mapping[str, Latent]:
        facts = _facts(self.corpus, self.vocab)
        starts_word, ends_sentence = facts.starts_word[tokens], facts.ends_sentence[tokens]
        place = torch.arange(tokens.shape[1]).expand_as(tokens)
        word_start = torch.where(starts_word, place, 0).cummax(1).values
        begins = torch.cat([torch.ones_like(ends_sentence[:, :1]), ends_sentence[:, :-1] & starts_word[:, 1:]], 1)
        sentence_start = torch.where(begins, place, 0).cummax(1).values
        known_word = starts_word.cummax(1).values
        known_sentence = begins.cumsum(1) > 1   # the first sentence began before the window
        return {
            "frequency": Latent(facts.frequency[tokens], FREQUENCY_CLASSES,
                                "frequency class of the token: floor(log4(rank + 1)), 0 the most frequent"),
            "word_place": Latent((place - word_start).clamp_max(7).masked_fill(~known_word, -1), 8,
                                 "tokens since the word began, 7 or more as 7"),
            "sentence_place": Latent((place - sentence_start).clamp_max(MAX_PLACE).masked_fill(~known_sentence, -1),
                                     MAX_PLACE + 1, f"tokens since the sentence began, {MAX_PLACE} or more as one"),
            "starts_word": Latent(starts_word.long(), 2, "whether the token begins a word"),
        }

    def visibility_latents(self, tokens: Int[Tensor, "example pos"],
                           noised: Int[Tensor, "example pos"]) -> Mapping[str, Latent]:
        """Latents of a partly masked window: ``nearest_visible`` and ``seen_elsewhere``, at masked positions."""
        masked = noised == self.mask_token_id
        distance = (torch.arange(tokens.shape[1])[:, None] - torch.arange(tokens.shape[1])).abs()
        nearest = torch.where(masked[:, None, :], tokens.shape[1], distance).min(-1).values
        same = tokens[:, :, None] == tokens[:, None, :]
        seen = (same & ~masked[:, None, :]).any(-1)
        return {
            "nearest_visible": Latent(torch.where(masked, nearest.clamp_max(8), -1), 9,
                                      "distance to the nearest visible position, 8 or more as 8"),
            "seen_elsewhere": Latent(torch.where(masked, seen.long(), -1), 2,
                                     "whether the masked token stands visibly elsewhere in the window"),
        }

    def regions(self) -> Int[Tensor, "pos"]:
        """One region: text has no order in which it must be filled."""
        return torch.zeros(self.length, dtype=torch.long)

    def decode(self, tokens: Int[Tensor, "pos"]) -> str:
        """Runs of visible tokens as text, ■ for each masked one."""
        ids, mask, bpe = tokens.tolist(), self.mask_token_id, tokenizer(self.vocab)
        pieces, run = [], []
        for token in [*ids, mask]:
            if token != mask:
                run.append(token)
                continue
            if run:
                pieces.append(bpe.decode(run, skip_special_tokens=False))
                run = []
            pieces.append(MASK_SIGN)
        return "".join(pieces[:-1])

    def encode(self, text: str) -> Int[Tensor, "pos"]:
        """Tokens of ``text``; any text that has exactly ``length`` tokens. The inverse of `decode` for windows that
        are the BPE's own segmentation of their text, which a window is unless it begins inside a word."""
        ids = encode_text(text, self.vocab, self.mask_token_id)
        if len(ids) != self.length:
            raise ValueError(f"the text has {len(ids)} tokens, and an example needs {self.length}.")
        return torch.tensor(ids)

    def token_names(self) -> list[str]:
        bpe = tokenizer(self.vocab)
        names = [bpe.id_to_token(i).replace("Ġ", "␣") for i in range(bpe.get_vocab_size())]
        return [*names, MASK_SIGN]

    def model_defaults(self) -> dict[str, Any]:
        return {"d_model": 128, "n_heads": 4, "d_mlp": 512, "n_head_layers": 1, "n_loop_layers": 2, "n_tail_layers": 1,
                "max_loops": 8, "position": "rotary", "rotary_base": 10_000.0, "qk_norm": True,
                "tie_embeddings": True}


@functools.cache
def tokenizer(vocab: int) -> Any:
    """The bundled BPE. FileNotFoundError names the command that makes another."""
    from tokenizers import Tokenizer

    path = DATA / f"bpe{vocab}.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: make it with "
                                f"`python studies/tasks/make_text.py --vocab {vocab} --source …`.")
    return Tokenizer.from_file(str(path))


def encode_text(text: str, vocab: int, mask_token_id: int) -> list[int]:
    """Token ids of a text in which ■ stands for a masked token."""
    ids: list[int] = []
    bpe = tokenizer(vocab)
    for index, part in enumerate(text.split(MASK_SIGN)):
        if index:
            ids.append(mask_token_id)
        for piece_index, piece in enumerate(part.split(SPECIAL[0])):
            if piece_index:
                ids.append(bpe.token_to_id(SPECIAL[0]))
            ids += _segment(bpe, piece)
    return ids


def _segment(bpe: Any, piece: str) -> list[int]:
    """BPE of a piece as it stands: the space that begins a word must be there for the token to have it."""
    if not piece:
        return []
    if piece.startswith(" "):
        return list(bpe.encode(piece, add_special_tokens=False).ids)
    head, space, rest = piece.partition(" ")   # the tokeniser adds a space that this word does not have
    return [*_without_space(bpe, head), *(bpe.encode(space + rest, add_special_tokens=False).ids if space else [])]


def _without_space(bpe: Any, word: str) -> list[int]:
    marker = "\n"   # a byte that merges with nothing in text whose white space is single spaces
    ids = bpe.encode(marker + word, add_special_tokens=False).ids
    first = bpe.encode(marker, add_special_tokens=False).ids
    return list(ids[len(first):])


def is_test_document(name: str) -> bool:
    """A fixed tenth of all documents, by a hash of their names."""
    return hashlib.sha256(name.encode()).digest()[0] < 26


def documents(corpus: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each document of a corpus, white space made single."""
    if corpus == "sotu":
        packed = lzma.decompress((DATA / "sotu.txt.xz").read_bytes()).decode()
        for document in packed.split("\f"):
            name, _, text = document.partition("\n")
            yield name, text
        return
    files = sorted(Path(corpus).glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"corpus {corpus!r} is neither 'sotu' nor a folder with .txt files.")
    for file in files:
        yield file.stem, " ".join(file.read_text().split())


@functools.cache
def _stream(corpus: str, vocab: int, split: str, most: int = 0) -> Int[Tensor, "token"]:
    """All tokens of a split, documents ended by <end>; or the first ``most``, of documents in the order of a hash of
    their names, so that a part is of all times and authors."""
    bpe = tokenizer(vocab)
    end = bpe.token_to_id(SPECIAL[0])
    chosen = [(name, text) for name, text in documents(corpus) if is_test_document(name) == (split == "test")]
    if most:
        chosen.sort(key=lambda document: hashlib.sha256(document[0].encode()).digest())
    texts = [text for _, text in chosen]
    ids = [np.array([*encoding.ids, end], dtype=np.int32) for encoding in bpe.encode_batch(texts)]
    stream = torch.from_numpy(np.concatenate(ids)) if ids else torch.empty(0, dtype=torch.int32)
    if len(stream) < most:
        raise ValueError(f"train_tokens is {most}, and the {split} split of {corpus!r} has {len(stream)} tokens.")
    return stream[:most] if most else stream


@dataclass(frozen=True)
class _Facts:
    frequency: Int[Tensor, "token"]
    starts_word: Bool[Tensor, "token"]
    ends_sentence: Bool[Tensor, "token"]


@functools.cache
def _facts(corpus: str, vocab: int) -> _Facts:
    bpe = tokenizer(vocab)
    size = bpe.get_vocab_size()
    counts = torch.bincount(_stream(corpus, vocab, "train").long(), minlength=size)
    rank = torch.empty(size, dtype=torch.long)
    rank[counts.argsort(descending=True, stable=True)] = torch.arange(size)
    frequency = ((rank + 1).float().log2() / 2).long().clamp_max(FREQUENCY_CLASSES - 1)
    names = [bpe.id_to_token(i) for i in range(size)]
    starts = torch.tensor([name.startswith("Ġ") or name in SPECIAL for name in names])
    ends = torch.tensor([name in SPECIAL or name.lstrip("Ġ") in {".", "!", "?", '."', '?"', '!"'} for name in names])
    return _Facts(frequency, starts, ends)
