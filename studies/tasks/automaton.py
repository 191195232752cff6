"""Elementary cellular automata: the smallest task on which loops visibly matter.

A random first row is given; every later row follows from the one above it by the rule,
on a ring. All rows are flattened into one sequence. The latents are the cells themselves,
the three cells above each one, and the row a cell stands in: a model that applies the rule
once per loop should make one more row (or more) decodable with each loop.

    >>> print(Automaton(rule=30, width=12, rows=3).decode(Automaton(rows=3).sample(1, seed=0).tokens[0]))
    .##.#######.
    ##..#......#
    ..####....##
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from studies.tasks.contract import Batch, Latent, Task

_SPLIT = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Automaton(Task):
    """Wolfram's elementary automaton ``rule`` on a ring of ``width`` cells, ``rows`` rows with the given one.

    First rows are split into train and test by a fixed hash: a quarter of them is never trained on.
    """

    name: ClassVar[str] = "automaton"
    region_name: ClassVar[str] = "row"

    rule: int = 30   # Wolfram number, 0..255
    width: int = 12  # cells in a row, at least 3
    rows: int = 8    # rows in all, the given first one included

    def __post_init__(self) -> None:
        if not 0 <= self.rule <= 255:
            raise ValueError(f"rule must be 0..255, not {self.rule}.")
        if self.width < 3 or self.rows < 2:
            raise ValueError(f"width must be at least 3 and rows at least 2, not {self.width} and {self.rows}.")

    @property
    def vocab_size(self) -> int:
        return 3

    @property
    def seq_len(self) -> int:
        return self.width * self.rows

    @property
    def grid_shape(self) -> tuple[int, int]:
        return self.rows, self.width

    def sample(self, n: int, seed: int, split: str = "train") -> Batch:
        if split not in _SPLIT:
            raise ValueError(f"split must be 'train' or 'test', not {split!r}.")
        generator = torch.Generator().manual_seed(2 * seed + _SPLIT[split])
        kept = torch.empty(0, self.width, dtype=torch.long)
        while len(kept) < n:
            first = torch.randint(0, 2, (4 * n + 8, self.width), generator=generator)
            kept = torch.cat([kept, first[_is_test(first) == (split == "test")]])
        tokens = self.run(kept[:n]).flatten(1)
        free = (self.regions() > 0).expand(n, -1)
        return Batch(tokens, free)

    def run(self, first: Int[Tensor, "example column"]) -> Int[Tensor, "example row column"]:
        """All rows that follow from the first one."""
        table = torch.tensor([self.rule >> i & 1 for i in range(8)])
        grid = [first]
        for _ in range(self.rows - 1):
            grid.append(table[_neighbourhood(grid[-1])])
        return torch.stack(grid, 1)

    def latents(self, tokens: Int[Tensor, "example pos"],
                free: Bool[Tensor, "example pos"] | None = None) -> Mapping[str, Latent]:
        grid = tokens.view(-1, self.rows, self.width)
        above = torch.full_like(grid, -1)
        above[:, 1:] = _neighbourhood(grid[:, :-1])
        below = torch.full_like(grid, -1)
        below[:, :-1] = grid[:, 1:]
        return {
            "cell": Latent(tokens, 2, "the cell itself"),
            "above": Latent(above.flatten(1), 8, "the three cells above it, as a number 0..7"),
            "below": Latent(below.flatten(1), 2, "the cell below it"),
        }

    def regions(self) -> Int[Tensor, "pos"]:
        return torch.arange(self.rows).repeat_interleave(self.width)

    def decode(self, tokens: Int[Tensor, "pos"]) -> str:
        signs = ".#?"
        return "\n".join("".join(signs[c] for c in row) for row in tokens.view(self.rows, self.width).tolist())

    def encode(self, text: str) -> Int[Tensor, "pos"]:
        lines = text.split()
        if len(lines) != self.rows or any(len(line) != self.width or set(line) - set(".#?") for line in lines):
            raise ValueError(f"expected {self.rows} lines of {self.width} signs out of '.', '#' and '?' (masked).")
        return torch.tensor([".#?".index(sign) for line in lines for sign in line])

    def token_names(self) -> list[str]:
        return ["0", "1", "■"]

    def position_names(self) -> list[str]:
        return [f"row {row}, column {column}" for row in range(self.rows) for column in range(self.width)]

    def model_defaults(self) -> dict[str, Any]:
        return {"d_model": 64, "n_heads": 4, "d_mlp": 256, "n_head_layers": 1, "n_loop_layers": 2,
                "n_tail_layers": 1, "max_loops": 8, "position": "rotary", "rotary_base": 100.0, "qk_norm": True}


def _neighbourhood(row: Int[Tensor, "... column"]) -> Int[Tensor, "... column"]:
    """The three cells around each one as a number, left cell most significant, on a ring."""
    return 4 * row.roll(1, -1) + 2 * row + row.roll(-1, -1)


def _is_test(first: Int[Tensor, "example column"]) -> Tensor:
    """A fixed quarter of all first rows, chosen by a hash of their bits."""
    code = (first * 2 ** (torch.arange(first.shape[1]) % 31)).sum(1)
    return (code * 2654435761 % 2 ** 32 >> 16) % 4 == 0
