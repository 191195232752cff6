"""Chains of additions and multiplications modulo a number: a word problem with labelled steps.

Every step takes the value before it, and adds or multiplies by a given number; the results are
to be filled in. Factors are units of the modulus, so that no step forgets the value before it
and every result needs the whole chain. Operations and operands are given; the results are free.

    >>> print(Arithmetic(modulus=7, steps=3).decode(Arithmetic(steps=3).sample(1, seed=0).tokens[0]))
    a = 4
    b = a + 3 = 0
    c = b * 5 = 0
    d = c + 5 = 5
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from studies.tasks.contract import Batch, Latent, Task

_SIGNS = "+*"
_LABELS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Arithmetic(Task):
    """``steps`` operations modulo ``modulus`` on a first value.

    Tokens: digits 0..modulus−1, the signs + and *, one label per value, the mask. Layout: label and value of
    the start, then label, sign, operand, result for each step. A quarter of all problems, chosen by a hash of
    start, signs and operands, is kept for testing.
    """

    name: ClassVar[str] = "arithmetic"
    region_name: ClassVar[str] = "step"

    modulus: int = 7   # 3..64; prime ones leave most factors to choose from
    steps: int = 10    # operations, 1..25

    def __post_init__(self) -> None:
        if not 3 <= self.modulus <= 64:
            raise ValueError(f"modulus must be 3..64, not {self.modulus}.")
        if not 1 <= self.steps < len(_LABELS):
            raise ValueError(f"steps must be 1..{len(_LABELS) - 1}, not {self.steps}.")

    @property
    def vocab_size(self) -> int:
        return self.modulus + len(_SIGNS) + self.steps + 1 + 1

    @property
    def seq_len(self) -> int:
        return 2 + 4 * self.steps

    @property
    def factors(self) -> list[int]:
        """Numbers to multiply by: units of the modulus but 1."""
        return [f for f in range(2, self.modulus) if math.gcd(f, self.modulus) == 1]

    def sample(self, n: int, seed: int, split: str = "train") -> Batch:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {split!r}.")
        generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
        factors = torch.tensor(self.factors)
        kept = torch.empty(0, self.seq_len, dtype=torch.long)
        while len(kept) < n:
            shape = (4 * n + 8, self.steps)
            start = torch.randint(0, self.modulus, (shape[0],), generator=generator)
            signs = torch.randint(0, 2, shape, generator=generator)
            addends = torch.randint(1, self.modulus, shape, generator=generator)
            multipliers = factors[torch.randint(0, len(factors), shape, generator=generator)]
            operands = torch.where(signs == 0, addends, multipliers)
            chosen = self._is_test(start, signs, operands) == (split == "test")
            kept = torch.cat([kept, self.layout(start[chosen], signs[chosen], operands[chosen])])
        return Batch(kept[:n], self.free_positions().expand(n, -1))

    def layout(self, start: Int[Tensor, "example"], signs: Int[Tensor, "example step"],
               operands: Int[Tensor, "example step"]) -> Int[Tensor, "example pos"]:
        """Whole examples, results computed. ``signs``: 0 adds, 1 multiplies."""
        label = self.modulus + len(_SIGNS)
        value = start
        columns = [torch.full_like(start, label), start]
        for step in range(self.steps):
            sign, operand = signs[:, step], operands[:, step]
            value = torch.where(sign == 0, value + operand, value * operand) % self.modulus
            columns += [torch.full_like(start, label + step + 1), self.modulus + sign, operand, value]
        return torch.stack(columns, 1)

    def free_positions(self) -> Bool[Tensor, "pos"]:
        """True where results stand."""
        positions = torch.arange(self.seq_len)
        return (positions >= 2) & (positions % 4 == 1)

    def latents(self, tokens: Int[Tensor, "example pos"],
                free: Bool[Tensor, "example pos"] | None = None) -> Mapping[str, Latent]:
        signs, operands, results = (tokens[:, 2:].unflatten(1, (self.steps, 4))[..., i] for i in (1, 2, 3))
        before = torch.cat([tokens[:, 1:2], results[:, :-1]], 1)
        whole = torch.where(signs == self.modulus, before + operands, before * operands)
        value = torch.cat([tokens[:, 1:2].expand(-1, 2), results.repeat_interleave(4, 1)], 1)
        undefined = torch.full_like(tokens[:, :2], -1)
        return {
            "value": Latent(value, self.modulus, "the value at the end of the step that the position belongs to"),
            "before": Latent(torch.cat([undefined, before.repeat_interleave(4, 1)], 1), self.modulus,
                             "the value that the step starts from"),
            "carry": Latent(torch.cat([undefined, (whole // self.modulus).repeat_interleave(4, 1)], 1), self.modulus,
                            "how many times the modulus goes into the step's result before it is taken off"),
        }

    def regions(self) -> Int[Tensor, "pos"]:
        return torch.cat([torch.zeros(2, dtype=torch.long), 1 + torch.arange(self.steps).repeat_interleave(4)])

    def decode(self, tokens: Int[Tensor, "pos"]) -> str:
        names = self.token_names()
        words = [names[token] for token in tokens.tolist()]
        lines = [f"{words[0]} = {words[1]}"]
        for step in range(self.steps):
            label, sign, operand, result = words[2 + 4 * step:6 + 4 * step]
            lines.append(f"{label} = {_LABELS[step]} {sign} {operand} = {result}")
        return "\n".join(lines)

    def encode(self, text: str) -> Int[Tensor, "pos"]:
        names, lines = self.token_names(), [line for line in text.splitlines() if line.strip()]
        first = re.fullmatch(r"\s*(\S+) = (\S+)\s*", lines[0]) if lines else None
        rest = [re.fullmatch(r"\s*(\S+) = (\S+) (\S+) (\S+) = (\S+)\s*", line) for line in lines[1:]]
        if first is None or len(rest) != self.steps or any(match is None for match in rest):
            raise ValueError(f"expected 'a = 5' and {self.steps} lines like 'b = a * 3 = 1'; ■ is a masked result.")
        words = [*first.groups()]
        for step, match in enumerate(rest):
            label, source, *others = match.groups() if match else ()
            if source != _LABELS[step]:
                raise ValueError(f"line {step + 2} must start from {_LABELS[step]!r}, not {source!r}.")
            words += [label, *others]
        if unknown := sorted(set(words) - set(names)):
            raise ValueError(f"{unknown} are not among the tokens {names}.")
        return torch.tensor([names.index(word) for word in words])

    def token_names(self) -> list[str]:
        return [str(i) for i in range(self.modulus)] + list(_SIGNS) + list(_LABELS[:self.steps + 1]) + ["■"]

    def position_names(self) -> list[str]:
        names = ["label of the start", "start"]
        for step in range(1, self.steps + 1):
            names += [f"step {step}, {what}" for what in ("label", "sign", "operand", "result")]
        return names

    def model_defaults(self) -> dict[str, Any]:
        return {"d_model": 64, "n_heads": 4, "d_mlp": 256, "n_head_layers": 1, "n_loop_layers": 2,
                "n_tail_layers": 1, "max_loops": 8, "position": "rotary", "rotary_base": 100.0, "qk_norm": True}

    def _is_test(self, start: Tensor, signs: Tensor, operands: Tensor) -> Bool[Tensor, "example"]:
        code = start + 1
        for step in range(self.steps):
            code = (code * 1_000_003 + signs[:, step] * self.modulus + operands[:, step]) % (2 ** 31 - 1)
        return (code * 2654435761 % 2 ** 32 >> 16) % 4 == 0
