"""Operations on bits that a codec runs: what a letter of its sequence stands for.

    OPERATIONS["A"](bits)                                     # Rule 30 on a ring; bits [example, bit] of 0 and 1
    mixture(rule_30, majority, 0.25)(bits)                    # a quarter of the bits by majority
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from jaxtyping import Int
from torch import Tensor

Operation = Callable[[Int[Tensor, "example bit"]], Int[Tensor, "example bit"]]
"""A map of bits to bits of the same number, each 0 or 1."""


def _left(z: Tensor, by: int = 1) -> Tensor:
    """Each bit's neighbour on the left, on a ring."""
    return z.roll(by, 1)


def _right(z: Tensor, by: int = 1) -> Tensor:
    return z.roll(-by, 1)


def rule_30(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """Elementary automaton 30 on a ring: left ⊕ (self ∨ right)."""
    return _left(z) ^ (z | _right(z))


def mirrored_gate(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """z ⊕ (the mirrored bit ∧ the left neighbour)."""
    return z ^ (z.flip(1) & _left(z))


def majority(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """The commoner value among left neighbour, self and right neighbour."""
    return (_left(z) + z + _right(z) >= 2).long()


def half_turn(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """The bit on the other side of the ring ⊕ (z ∧ the left neighbour)."""
    return _left(z, z.shape[1] // 2) ^ (z & _left(z))


def rule_90(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """Elementary automaton 90: left ⊕ right."""
    return _left(z) ^ _right(z)


def negated_shift(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """The negated bit two places to the right."""
    return 1 - _right(z, 2)


def conjunction(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """z ∧ (left ∨ right): ones become rare, so that the content's mean moves from loop to loop."""
    return z & (_left(z) | _right(z))


def swap_if(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """The mirrored bits where the first bit is set, else the bits shifted by three."""
    return torch.where(z[:, :1] == 1, z.flip(1), _left(z, 3))


def rule_110(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """Elementary automaton 110 on a ring."""
    return (z | _right(z)) & (1 - (_left(z) & z & _right(z)))


def rule_54(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """Elementary automaton 54 on a ring: z ⊕ (left ∨ right)."""
    return z ^ (_left(z) | _right(z))


def mirrored_sum(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """The mirrored bits, every other one negated, ⊕ (the left neighbour ∧ the one beyond)."""
    return z.flip(1) ^ (torch.arange(z.shape[1], device=z.device) % 2) ^ (_left(z) & _left(z, 2))


def gray_code(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """z ⊕ the bit on the right, the last one as it is: linear and invertible."""
    return z ^ torch.cat([z[:, 1:], torch.zeros_like(z[:, :1])], 1)


def multiply_and_add(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
    """5 · z + 3 modulo 2^bits, the first bit the least: carries reach far."""
    place = 2 ** torch.arange(z.shape[1], device=z.device)
    number = (5 * (z * place).sum(1) + 3) % 2 ** z.shape[1]
    return (number[:, None] // place) % 2


def mixture(one: Operation, other: Operation, share: float) -> Operation:
    """An operation that is like ``one`` but for the first ``share`` of the bits, which are as ``other`` makes them.

    A dial: at 0 it is ``one``, at 1 ``other``. Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is a part of the bits, between 0 and 1, not {share}.")

    def mixed(z: Int[Tensor, "example bit"]) -> Int[Tensor, "example bit"]:
        cut = round(share * z.shape[1])
        return torch.cat([other(z)[:, :cut], one(z)[:, cut:]], 1)

    return mixed


OPERATIONS: Mapping[str, Operation] = MappingProxyType({
    "A": rule_30, "B": mirrored_gate, "C": majority, "D": half_turn,
    "E": rule_90, "F": negated_shift, "G": conjunction, "H": swap_if, "P": rule_110, "Q": multiply_and_add,
    "R": gray_code, "S": mirrored_sum, "T": rule_54})
"""The operations that letters stand for by default."""
