"""Sudoku, 6 × 6 or 9 × 9: constraint propagation with known rounds, and cells that need search.

The clues are given, all blanks are free. Every puzzle has one solution. The latents follow a
solver that knows two rules, applied to all cells at once, round by round: a cell with one
candidate left is determined (naked single), and so is a digit with one cell left in a row,
column or box (hidden single). A cell that never becomes determined needs search.

Puzzles come from data/sudoku<size>.npz, made by make_sudoku.py; digits are relabelled at
random, and no solution of the test split equals one of the training split after relabelling. In 9 × 9
that is so after any change of places that keeps the rules, too, so ``symmetries`` may train on all images of
a puzzle; 6 × 6 has too few different solutions for that.

    >>> batch = Sudoku(size=6).sample(1, seed=0)
    >>> print(Sudoku(size=6).decode(batch.tokens.masked_fill(batch.free, 6)[0]))     # "." is a blank
    . . . | 6 . .
    6 . . | . . 4
    ------+------
    . 2 6 | . . .
    . . 1 | . . .
    ------+------
    . . . | 2 . .
    5 4 . | 1 . .
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from studies.tasks.contract import Batch, Latent, Task

DATA = Path(__file__).resolve().parent / "data"
MAX_ROUNDS = 10
"""Rounds that the latent tells apart; later ones count as this one."""
CANDIDATE_ROUNDS = 4
"""Rounds whose candidate sets are latents."""


class Shape:
    """Rows, columns and boxes of a sudoku of ``size`` digits."""

    BOXES: ClassVar[dict[int, tuple[int, int]]] = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # rows × columns of a box

    def __init__(self, size: int):
        self.size = size
        box_rows, box_columns = self.BOXES[size]
        row = torch.arange(size).repeat_interleave(size)
        column = torch.arange(size).repeat(size)
        box = row // box_rows * (size // box_columns) + column // box_columns
        self.unit_of_cell: Int[Tensor, "kind cell"] = torch.stack([row, column, box])
        member = torch.nn.functional.one_hot(self.unit_of_cell, size)             # [kind, cell, unit]
        self.members: Tensor = member.transpose(1, 2).reshape(3 * size, -1).float()  # [unit, cell]


@dataclass(frozen=True)
class Propagation:
    """What singles find out about each cell."""

    candidates: Bool[Tensor, "round example cell digit"]  # before each round, from what the earlier ones determined
    round: Int[Tensor, "example cell"]  # 0 given, r determined in round r (from 1), −1 needs search


def propagate(solution: Int[Tensor, "example cell"], given: Bool[Tensor, "example cell"], shape: Shape) -> Propagation:
    """Naked and hidden singles, all cells at once, until nothing changes.

    Digits from 0. ``candidates[r]`` is what rows, columns and boxes leave possible before round r + 1; a
    determined cell has its digit as the only candidate. The last entry is the fixed point.
    """
    digits = torch.nn.functional.one_hot(solution, shape.size).bool()
    known = given.clone()
    when = torch.where(given, 0, -1)
    history = []
    for number in range(1, solution.shape[1] + 2):
        fixed = (digits & known[..., None]).float()
        in_unit = torch.einsum("uc,ecd->eud", shape.members, fixed) > 0                   # digit is in the unit
        gone = torch.einsum("uc,eud->ecd", shape.members, in_unit.float()) > 0
        candidates = torch.where(known[..., None], digits, ~gone)
        history.append(candidates)
        naked = candidates.sum(-1) == 1
        places = torch.einsum("uc,ecd->eud", shape.members, candidates.float())
        only = torch.einsum("uc,eud->ecd", shape.members, (places == 1).float()) > 0
        found = (naked | (only & candidates).any(-1)) & ~known
        if not found.any():
            break
        when[found] = number
        known = known | found
    return Propagation(torch.stack(history), when)


@dataclass(frozen=True)
class Sudoku(Task):
    """Fill the blanks of puzzles with one solution. Difficulty: size, how they are solved, and extra clues."""

    name: ClassVar[str] = "sudoku"
    region_name: ClassVar[str] = "box"

    size: int = 6                                        # 6 or 9 digits
    level: Literal["any", "singles", "search"] = "any"   # solved by singles alone, needs search, or either
    extra_givens: int = 0                                # blanks revealed at random beyond the puzzle's clues
    symmetries: bool = False                             # train on the puzzles' images too: see `images`; 9 × 9 only

    def __post_init__(self) -> None:
        if self.size not in (6, 9):
            raise ValueError(f"size must be 6 or 9, not {self.size}.")
        if self.level not in ("any", "singles", "search"):
            raise ValueError(f"level must be 'any', 'singles' or 'search', not {self.level!r}.")
        if self.symmetries and self.size != 9:
            raise ValueError(f"symmetries would turn training puzzles of size {self.size} into those of the test "
                             "split: use them with size 9.")
        if not 0 <= self.extra_givens < self.seq_len:
            raise ValueError(f"extra_givens must be 0..{self.seq_len - 1}, not {self.extra_givens}.")

    @property
    def vocab_size(self) -> int:
        return self.size + 1

    @property
    def seq_len(self) -> int:
        return self.size * self.size

    @property
    def grid_shape(self) -> tuple[int, int]:
        return self.size, self.size

    @property
    def shape(self) -> Shape:
        return _shape(self.size)

    def sample(self, n: int, seed: int, split: str = "train") -> Batch:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {split!r}.")
        solutions, given = self.puzzles(split)
        generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
        if split == "test" and n <= len(solutions):   # no puzzle twice
            chosen = torch.randperm(len(solutions), generator=generator)[:n]
        else:
            chosen = torch.randint(0, len(solutions), (n,), generator=generator)
        names = torch.rand(n, self.size, generator=generator).argsort(1)
        tokens = names.gather(1, solutions[chosen])
        free = ~given[chosen]
        if self.symmetries and split == "train":
            cells = self.images(n, generator)
            tokens, free = tokens.gather(1, cells), free.gather(1, cells)
        if self.extra_givens:
            order = torch.rand(free.shape, generator=generator).masked_fill(~free, 2.0).argsort(1).argsort(1)
            free = free & (order >= self.extra_givens)
        return Batch(tokens, free)

    def images(self, n: int, generator: torch.Generator) -> Int[Tensor, "example cell"]:
        """For each of ``n`` boards, which cell goes where in a random symmetry of the rules: bands, rows within a
        band, stacks and columns within a stack change places, and rows with columns."""
        def lines() -> Int[Tensor, "example line"]:
            bands = torch.rand(n, 3, generator=generator).argsort(1)
            within = torch.rand(n, 3, 3, generator=generator).argsort(2)
            return (bands[..., None] * 3 + within).flatten(1)

        cells = lines()[:, :, None] * self.size + lines()[:, None, :]
        turned = torch.rand(n, generator=generator) < 0.5
        return torch.where(turned[:, None, None], cells.transpose(1, 2), cells).flatten(1)

    def puzzles(self, split: str) -> tuple[Int[Tensor, "puzzle cell"], Bool[Tensor, "puzzle cell"]]:
        """All stored puzzles of a split at this level: solutions (first row 0, 1, 2, …) and clues."""
        return _puzzles(self.size, self.level, split)

    def latents(self, tokens: Int[Tensor, "example pos"],
                free: Bool[Tensor, "example pos"] | None = None) -> Mapping[str, Latent]:
        latents = {"digit": Latent(tokens, self.size, "the digit of the solution")}
        if free is None:   # everything else depends on which cells are clues
            return latents
        found = propagate(tokens, ~free, self.shape)
        search = MAX_ROUNDS + 1
        when = torch.where(found.round < 0, search, found.round.clamp_max(MAX_ROUNDS))
        latents["round"] = Latent(when, search + 1, "round of singles that determines the cell: 0 given, "
                                  f"{MAX_ROUNDS} that or later, {search} never (needs search)")
        weights = 2 ** torch.arange(self.size)
        for number in range(CANDIDATE_ROUNDS):
            candidates = found.candidates[min(number, len(found.candidates) - 1)]
            latents[f"candidates_{number}"] = Latent(
                (candidates * weights).sum(-1), 2 ** self.size,
                f"candidate set after {number} rounds, digit d as bit d")
        for number in range(CANDIDATE_ROUNDS):
            candidates = found.candidates[min(number, len(found.candidates) - 1)]
            latents[f"n_candidates_{number}"] = Latent(candidates.sum(-1), self.size + 1,
                                                       f"number of candidates after {number} rounds")
        return latents

    def regions(self) -> Int[Tensor, "pos"]:
        """The box of each cell: which cells come first differs from puzzle to puzzle (latent ``round``)."""
        return self.shape.unit_of_cell[2]

    def decode(self, tokens: Int[Tensor, "pos"]) -> str:
        box_rows, box_columns = Shape.BOXES[self.size]
        signs = [str(d + 1) for d in range(self.size)] + ["."]
        lines = []
        for index, row in enumerate(tokens.view(self.size, self.size).tolist()):
            groups = [" ".join(signs[d] for d in row[i:i + box_columns]) for i in range(0, self.size, box_columns)]
            if index and index % box_rows == 0:
                lines.append("-+-".join("-" * len(group) for group in groups))
            lines.append(" | ".join(groups))
        return "\n".join(lines)

    def encode(self, text: str) -> Int[Tensor, "pos"]:
        signs = [sign for sign in text if sign not in " |+-\n"]
        known = "123456789"[:self.size] + "."
        if len(signs) != self.seq_len or set(signs) - set(known):
            raise ValueError(f"expected {self.seq_len} signs out of 1..{self.size} and '.' (blank), "
                             f"not {len(signs)} with {sorted(set(signs) - set(known))}.")
        return torch.tensor([known.index(sign) for sign in signs])

    def token_names(self) -> list[str]:
        return [str(d + 1) for d in range(self.size)] + ["■"]

    def position_names(self) -> list[str]:
        return [f"row {row + 1}, column {column + 1}" for row in range(self.size) for column in range(self.size)]

    def model_defaults(self) -> dict[str, Any]:
        groups = tuple(tuple(kind.tolist()) for kind in self.shape.unit_of_cell)
        return {"d_model": 64, "n_heads": 4, "d_mlp": 256, "n_head_layers": 1, "n_loop_layers": 2, "n_tail_layers": 1,
                "max_loops": 8, "position": "learned", "position_groups": groups, "input_injection": "add",
                "qk_norm": True}


@functools.cache
def _shape(size: int) -> Shape:
    return Shape(size)


@functools.cache
def _load(size: int) -> dict[str, np.ndarray]:
    path = DATA / f"sudoku{size}.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: make it with `python studies/tasks/make_sudoku.py --size {size}`.")
    with np.load(path, allow_pickle=False) as data:
        return {name: data[name] for name in data.files}


@functools.cache
def _puzzles(size: int, level: str, split: str) -> tuple[Tensor, Tensor]:
    data = _load(size)
    chosen = data["test"] == (split == "test")
    if level != "any":
        chosen = chosen & ((data["rounds"] == 0) == (level == "search"))
    if not chosen.any():
        raise ValueError(f"data/sudoku{size}.npz holds no {split} puzzles of level {level!r}.")
    given = np.unpackbits(data["givens"][chosen], axis=1, count=size * size).astype(bool)
    return torch.from_numpy(data["solutions"][chosen].astype(np.int64)), torch.from_numpy(given)
