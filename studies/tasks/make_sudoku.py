"""Makes the sudoku puzzles that ship with the task: unique solutions, run offline.

    python studies/tasks/make_sudoku.py --size 6 --puzzles 40000
    python studies/tasks/make_sudoku.py --size 9 --puzzles 2400

A random full grid is dug out, cell by cell in random order, as long as the solution stays
unique; the result is irreducible (no clue can be spared), or stops at ``min_givens``. Each
solution is stored relabelled so that its first row reads 1, 2, 3, …; puzzles whose relabelled
solutions are equal always fall on the same side of the split. Writes
data/sudoku<size>.npz with ``solutions`` [puzzle, cell], ``givens`` (bits, packed), ``rounds``
(rounds of singles that solve it, 0 where search is needed) and ``test``.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from studies.tasks.sudoku import Shape, propagate


@dataclass(frozen=True)
class MakeSudoku:
    """Dig puzzles with unique solutions."""

    size: int = 6
    """6 (boxes of 2 × 3) or 9 (3 × 3)."""
    puzzles: int = 40_000
    """How many, before duplicates are dropped."""
    min_givens: int = 0
    """Stop digging at so many clues; 0 digs until no clue can be spared."""
    per_solution: int = 2
    """Puzzles dug out of one full grid."""
    test_share: float = 0.1
    """Share of solutions kept for testing."""
    seed: int = 0
    """Of grids, digging order and split."""
    out: Path = Path(__file__).resolve().parent / "data"
    """Folder of the file."""


class Solver:
    """Backtracking on the cell with fewest candidates, candidates as bits."""

    def __init__(self, size: int):
        shape = Shape(size)
        self.cells, self.all = size * size, (1 << size) - 1
        self.units = [tuple(unit + kind * size for kind, unit in enumerate(three))
                      for three in shape.unit_of_cell.T.tolist()]
        self.n_units = 3 * size

    def count(self, grid: list[int], limit: int, rng: random.Random | None = None) -> tuple[int, list[int]]:
        """Number of solutions up to ``limit`` (digits from 1, 0 is empty), and the last one found."""
        used = [0] * self.n_units
        for cell, digit in enumerate(grid):
            if digit:
                for unit in self.units[cell]:
                    used[unit] |= 1 << (digit - 1)
        state = list(grid)
        return self._search(state, used, [c for c in range(self.cells) if not grid[c]], limit, rng), state

    def _search(self, grid: list[int], used: list[int], empty: list[int], limit: int, rng: random.Random | None) -> int:
        if not empty:
            return 1
        best, fewest, best_index = 0, 99, -1
        for index, cell in enumerate(empty):
            row, column, box = self.units[cell]
            options = self.all & ~(used[row] | used[column] | used[box])
            if (count := options.bit_count()) < fewest:
                best, fewest, best_index = options, count, index
                if count <= 1:
                    break
        if not best:
            return 0
        cell = empty[best_index]
        rest = empty[:best_index] + empty[best_index + 1:]
        bits = [1 << i for i in range(self.all.bit_length()) if best >> i & 1]
        if rng is not None:
            rng.shuffle(bits)
        found = 0
        for bit in bits:
            grid[cell] = bit.bit_length()
            for unit in self.units[cell]:
                used[unit] |= bit
            found += self._search(grid, used, rest, limit - found, rng)
            for unit in self.units[cell]:
                used[unit] &= ~bit
            if found >= limit:
                return found
        if not found:
            grid[cell] = 0
        return found


def full_grid(solver: Solver, rng: random.Random) -> list[int]:
    """A random solution."""
    return solver.count([0] * solver.cells, 1, rng)[1]


def dig(solver: Solver, solution: list[int], rng: random.Random, min_givens: int) -> list[int]:
    """Remove clues in random order while the solution stays unique."""
    grid, givens = list(solution), len(solution)
    for cell in rng.sample(range(solver.cells), solver.cells):
        if givens <= min_givens:
            break
        kept, grid[cell] = grid[cell], 0
        if solver.count(grid, 2)[0] > 1:
            grid[cell] = kept
        else:
            givens -= 1
    return grid


def make_sudoku(args: MakeSudoku) -> Path:
    """Dig, measure difficulty, split and write. The file is the same for the same arguments."""
    rng, solver = random.Random(args.seed), Solver(args.size)
    rows: dict[tuple[tuple[int, ...], tuple[bool, ...]], None] = {}
    for _ in tqdm(range(args.puzzles // args.per_solution), desc=f"{args.size} × {args.size}"):
        solution = full_grid(solver, rng)
        rename = {digit: position for position, digit in enumerate(solution[:args.size])}
        for _ in range(args.per_solution):
            puzzle = dig(solver, solution, rng, args.min_givens)
            rows[tuple(rename[d] for d in solution), tuple(d > 0 for d in puzzle)] = None
    solutions = np.array([solution for solution, _ in rows], dtype=np.uint8)
    givens = np.array([given for _, given in rows])
    found = propagate(torch.from_numpy(solutions.astype(np.int64)), torch.from_numpy(givens), Shape(args.size))
    solved = ((found.round >= 0).all(1)).numpy()
    rounds = np.where(solved, found.round.max(1).values.numpy(), 0).astype(np.uint8)
    distinct = sorted({tuple(s) for s in solutions.tolist()})
    tests = set(rng.sample(distinct, max(1, round(args.test_share * len(distinct)))))
    test = np.array([tuple(s) in tests for s in solutions.tolist()])
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"sudoku{args.size}.npz"
    np.savez_compressed(path, solutions=solutions, givens=np.packbits(givens, axis=1), rounds=rounds, test=test)
    print(f"{len(rows)} puzzles of {len(distinct)} solutions, {test.sum()} for testing, {solved.mean():.0%} by "
          f"singles, {givens.sum(1).mean():.1f} givens, {path.stat().st_size / 1e6:.2f} MB → {path}")
    return path


if __name__ == "__main__":
    make_sudoku(tyro.cli(MakeSudoku, description=__doc__))
    sys.exit(0)
