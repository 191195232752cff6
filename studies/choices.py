"""Does τ hang on how it is computed? The same exchanges with other clocks, masks, numbers of examples and measures.

    python studies/choices.py                  # three tasks and two controls, minutes; writes results/choices.md
    python studies/choices.py --examples 96    # more examples where their number is not what is varied
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from hooks.writing import written_whole
from studies.checks import at_least, writable
from studies.questions.choices.measure import Sizes, measure
from studies.questions.choices.page import page
from studies.questions.controls.codec_files import CODECS
from studies.results import RESULTS
from studies.zoo import ZOO


@dataclass(frozen=True)
class Choices:
    """Compute τ in several ways."""

    examples: int = 48
    """Held-out examples, unless their number is what is varied."""
    draws: int = 3
    """Draws of examples where their number is varied."""
    seed: int = 0
    """Seed of examples and masks."""
    zoo: Path = ZOO
    """Where the models are."""
    codecs: Path = CODECS
    """Where the controls are."""
    results: Path = RESULTS
    """Where choices.json and choices.md go."""

    def __post_init__(self) -> None:
        at_least(2, examples=self.examples)
        at_least(1, draws=self.draws)


def main(args: Choices) -> int:
    """Measure and write; 2 if there is nothing to measure, or the results cannot be written."""
    try:
        writable(args.results)
    except OSError as error:
        print(error, file=sys.stderr)
        return 2
    torch.set_num_threads(1)   # the same numbers on every machine
    rows = measure(args.zoo, args.codecs, Sizes(examples=args.examples, draws=args.draws, seed=args.seed))
    if not rows:
        print(f"{args.zoo} and {args.codecs} hold none of the models: train them with `python studies/pretrain.py`.",
              file=sys.stderr)
        return 2
    text = page(rows, command="python studies/choices.py")
    print(text)
    for name, content in (("choices.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n"),
                          ("choices.md", text)):
        with written_whole(args.results / name) as temporary:
            temporary.write_text(content)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Choices, description=__doc__)))
