"""What a study's settings must be, checked as they are made: before any model is loaded or anything computed.

    noise_level(args.t)                             # ValueError unless 0 < t ≤ 1
    at_least(2, examples=args.examples)             # ValueError unless a whole number of at least 2
    writable(args.results)                          # OSError unless results can be written there

A script's settings call the first two in ``__post_init__``; its command line then prints the message and exits with
status 2. `writable` is asked before the computation, whose outcome would be lost.
"""

from __future__ import annotations

import tempfile
from pathlib import Path


def noise_level(t: float) -> None:
    """Raise ValueError unless ``t`` can be a noise level, the probability with which a free position is masked."""
    if not 0 < t <= 1:   # False for NaN, too
        raise ValueError(f"t is the share of free positions that is masked: above 0 and at most 1, not {t:g}. "
                         "Give --t 1 to mask all of them.")


def at_least(least: int, **counts: int | None) -> None:
    """Raise ValueError, by name, for a count below ``least``; None stands for a default and passes."""
    for name, count in counts.items():
        if count is not None and count < least:
            raise ValueError(f"{name} must be at least {least}, not {count}.")


def writable(folder: str | Path) -> Path:
    """Make ``folder`` if need be, and write a file there that goes again. OSError, with a remedy, if that fails."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OSError(f"nothing can be written to {path} ({error.strerror or error}): give another folder with "
                      "--results, or make this one writable.") from error
    return path
