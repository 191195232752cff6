"""What a study's settings must be, checked as they are made: before any model is loaded or anything computed.

    noise_level(args.t)                             # ValueError unless 0 < t ≤ 1
    at_least(2, examples=args.examples)             # ValueError unless a whole number of at least 2

A script's settings call these in ``__post_init__``; its command line then prints the message and exits with status 2.
"""

from __future__ import annotations


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
