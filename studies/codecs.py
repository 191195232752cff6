"""Make the codecs of the zoo again: looped blocks of known programme, the controls of the stage test.

    python studies/codecs.py                                  # trains what zoo/codecs/ lacks, a minute each on a core
    python studies/codecs.py --names ABAB ABCD-turned         # these, whether they are there or not
    python studies/codecs.py --list                           # says what each is, and trains nothing

A codec that does not reach an accuracy of 100% is not written; the command says so, and exits with status 1.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import tyro

from studies.questions.controls.codec import CodecFailed, codec
from studies.questions.controls.codec_files import CODECS, bundled_codecs, save_codec

PROGRAMMES: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "AAAA": {"sequence": "AAAA"},
    "ABCD": {"sequence": "ABCD"},
    "AABB": {"sequence": "AABB", "seed": 1},
    "ABAB": {"sequence": "ABAB", "seed": 1},
    "AB-width48": {"sequence": "AB", "width": 48, "bits": 10},
    "DADCD": {"sequence": "DADCD", "n_layers": 3, "bits": 10, "seed": 2},
    "AAAAAA-one-layer": {"sequence": "AAAAAA", "n_layers": 1, "d_mlp": 512, "bits": 8, "seed": 1},
    "ABCABC-width96": {"sequence": "ABCABC", "width": 96, "bits": 8},
    "AAAA-positions": {"sequence": "AAAA", "arrangement": "positions", "bits": 8, "batch_size": 128},
    "ABCD-positions": {"sequence": "ABCD", "arrangement": "positions", "bits": 8, "batch_size": 128},
    "BACA-positions": {"sequence": "BACA", "arrangement": "positions", "bits": 8, "batch_size": 128, "seed": 3},
    "AAAA-turned": {"sequence": "AAAA", "turned": True, "bits": 8},
    "ABCD-turned": {"sequence": "ABCD", "turned": True, "bits": 8},
})
"""What each codec of the zoo is: the settings of `CodecConfig`; its name says what is unusual."""


@dataclass(frozen=True)
class Codecs:
    """Train codecs and write them."""

    names: tuple[str, ...] = ()
    """Which; by default those that are missing."""
    list: bool = False
    """Say what each is, and train nothing."""
    codecs: Path = CODECS
    """Where they go."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.names) - set(PROGRAMMES)):
            raise ValueError(f"no codec is called {', '.join(unknown)}; there are {', '.join(PROGRAMMES)}.")


def main(args: Codecs) -> int:
    """Train and write; 1 if one did not learn its sequence."""
    if args.list:
        for name, settings in PROGRAMMES.items():
            print(f"{name:20} " + ", ".join(f"{key} {value}" for key, value in settings.items()))
        return 0
    torch.set_num_threads(1)   # the same weights whatever the machine has
    there = set(bundled_codecs(args.codecs))
    failed = 0
    for name in args.names or [name for name in PROGRAMMES if name not in there]:
        settings = dict(PROGRAMMES[name])
        try:
            made = codec(settings.pop("sequence"), **settings)
            save_codec(made, args.codecs / name, command=f"python studies/codecs.py --names {name}")
        except CodecFailed as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed = 1
            continue
        print(f"{name}: {made.truth}, {made.accuracy:.2%} right after {made.steps} steps", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Codecs, description=__doc__)))
