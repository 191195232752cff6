"""Sudoku: boards are valid, splits disjoint, and the latents agree with a slow solver."""

from __future__ import annotations

import random
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from studies.tasks import Sudoku
from studies.tasks.make_sudoku import MakeSudoku, Solver, dig, full_grid, make_sudoku
from studies.tasks.sudoku import MAX_ROUNDS, Shape


def rows(tokens: Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in tokens.tolist()}


def slow_singles(solution: list[int], given: list[bool], size: int) -> tuple[list[int], list[list[set[int]]]]:
    """Rounds of naked and hidden singles with Python sets; (round per cell, candidates before each round)."""
    box_rows, box_columns = {6: (2, 3), 9: (3, 3)}[size]
    units: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for cell in range(size * size):
        row, column = divmod(cell, size)
        for key in (("row", row, 0), ("column", column, 0), ("box", row // box_rows, column // box_columns)):
            units[key].append(cell)
    known = {cell: solution[cell] for cell in range(size * size) if given[cell]}
    when = [0 if g else -1 for g in given]
    history = []
    for number in range(1, size * size + 2):
        candidates = []
        for cell in range(size * size):
            seen = {known[other] for unit in units.values() if cell in unit for other in unit if other in known}
            candidates.append({known[cell]} if cell in known else set(range(size)) - seen)
        history.append(candidates)
        found = {}
        for cell in range(size * size):
            if cell not in known and len(candidates[cell]) == 1:
                found[cell] = next(iter(candidates[cell]))
        for unit in units.values():
            for digit in range(size):
                places = [cell for cell in unit if digit in candidates[cell]]
                if len(places) == 1 and places[0] not in known:
                    found[places[0]] = digit
        if not found:
            break
        for cell, digit in found.items():
            assert digit == solution[cell], "singles are sound"
            when[cell] = number
        known |= found
    return when, history


@pytest.mark.parametrize("level", ["singles", "search"])
def test_sudoku_latents(level: Any) -> None:
    task = Sudoku(size=6, level=level)
    batch = task.sample(12, seed=0, split="test")
    latents = task.latents(batch.tokens, batch.free)
    for example in range(12):
        when, history = slow_singles(batch.tokens[example].tolist(), (~batch.free[example]).tolist(), 6)
        expected = [MAX_ROUNDS + 1 if w < 0 else min(w, MAX_ROUNDS) for w in when]
        assert latents["round"].values[example].tolist() == expected
        assert (-1 in when) == (level == "search")
        for number in range(4):
            sets = history[min(number, len(history) - 1)]
            assert latents[f"candidates_{number}"].values[example].tolist() == [sum(2 ** d for d in s) for s in sets]
            assert latents[f"n_candidates_{number}"].values[example].tolist() == [len(s) for s in sets]


def canonical(solutions: Tensor) -> Tensor:
    """Digits renamed in order of appearance: equal for boards that are equal up to relabelling."""
    size = int(solutions.max()) + 1
    return solutions[:, :size].argsort(1).gather(1, solutions)


@pytest.mark.parametrize("size", [6, 9])
def test_sudoku_splits_are_disjoint_up_to_relabelling(size: int) -> None:
    task = Sudoku(size=size)
    train, test = (task.puzzles(split)[0] for split in ("train", "test"))
    assert len(test) >= 0.05 * len(train)
    assert not rows(canonical(train)) & rows(canonical(test))
    drawn = task.sample(500, seed=0).tokens   # sampling relabels: still boards of its own split only
    assert rows(canonical(drawn)) <= rows(canonical(train))
    assert len(drawn[:, 0].unique()) == size, "digits are relabelled"


def cycle_types(board: np.ndarray) -> tuple[Any, ...]:
    """The same for boards that a symmetry of the rules turns into one another: how each pair of rows permutes
    the digits, in the same band or not, and likewise columns."""
    def of_lines(lines: np.ndarray, together: int) -> tuple[Any, ...]:
        found = []
        for i, j in combinations(range(len(lines)), 2):
            step, seen, lengths = dict(zip(lines[i].tolist(), lines[j].tolist(), strict=True)), set(), []
            for digit in step:
                length = 0
                while digit not in seen:
                    seen.add(digit)
                    digit, length = step[digit], length + 1
                lengths += [length] if length else []
            found.append((i // together == j // together, tuple(sorted(lengths))))
        return tuple(sorted(found))

    return tuple(sorted((of_lines(board, 3), of_lines(board.T, 3))))


def test_sudoku_symmetries_keep_the_splits_apart() -> None:
    """Any symmetry leaves the cycle types as they are, and no test solution has those of a training solution."""
    task = Sudoku(size=9, symmetries=True)
    train, test = ({cycle_types(board.view(9, 9).numpy()) for board in canonical(task.puzzles(split)[0]).unique(dim=0)}
                   for split in ("train", "test"))
    assert len(train) > 1000
    assert not train & test
    drawn = {cycle_types(board.view(9, 9).numpy()) for board in task.sample(100, seed=0).tokens}
    assert drawn <= train


def test_sudoku_symmetries_move_cells_and_clues_alike() -> None:
    task = Sudoku(size=9, symmetries=True)
    cells = task.images(200, torch.Generator().manual_seed(0))
    assert len(cells.unique(dim=0)) > 195
    assert torch.equal(cells.sort(1).values, torch.arange(81).expand(200, -1))
    plain, turned = Sudoku(size=9).sample(50, seed=3), task.sample(50, seed=3)
    assert torch.equal(plain.free.sum(1), turned.free.sum(1))
    assert not torch.equal(plain.free, turned.free)
    for batch in (plain, turned):   # a clue keeps its digit
        assert torch.equal(_counts(batch.tokens, batch.free), _counts(plain.tokens, plain.free))
    assert torch.equal(Sudoku(size=9).sample(9, 0, "test").tokens, task.sample(9, 0, "test").tokens)


def _counts(tokens: Tensor, free: Tensor) -> Tensor:
    return torch.stack([((tokens == digit) & free).sum(1) for digit in range(9)])


@pytest.mark.parametrize(("size", "symmetries"), [(6, False), (9, False), (9, True)])
def test_sudoku_boards_are_valid(size: int, symmetries: bool) -> None:
    for split in ("train", "test"):
        task = Sudoku(size=size, symmetries=symmetries)
        solutions = task.sample(300, seed=0).tokens if symmetries else task.puzzles(split)[0]
        boards = solutions.view(-1, size, size)
        wanted = torch.arange(size).expand(len(boards), size, size)
        height = 2 if size == 6 else 3
        boxes = boards.view(-1, size // height, height, size // 3, 3).transpose(2, 3).reshape(-1, size, size)
        for units in (boards, boards.transpose(1, 2), boxes):
            assert torch.equal(units.sort(-1).values, wanted)


def solutions_of(puzzle: list[int], size: int, limit: int) -> list[list[int]]:
    """Every solution, by trying all digits at the first blank with fewest options (−1 is a blank)."""
    height = 2 if size == 6 else 3

    def options(board: list[int], cell: int) -> list[int]:
        row, column = divmod(cell, size)
        return [d for d in range(size) if not any(
            board[other] == d and (other // size == row or other % size == column or
                                   (other // size // height == row // height and other % size // 3 == column // 3))
            for other in range(size * size))]

    blanks = [(len(options(puzzle, cell)), cell) for cell in range(size * size) if puzzle[cell] < 0]
    if not blanks:
        return [puzzle]
    _, cell = min(blanks)
    found: list[list[int]] = []
    for digit in options(puzzle, cell):
        found += solutions_of([*puzzle[:cell], digit, *puzzle[cell + 1:]], size, limit - len(found))
        if len(found) >= limit:
            break
    return found


@pytest.mark.parametrize("level", ["singles", "search"])
def test_sudoku_has_one_solution(level: Any) -> None:
    batch = Sudoku(size=6, level=level).sample(6, seed=5)
    for tokens, free in zip(batch.tokens, batch.free, strict=True):
        puzzle = tokens.masked_fill(free, -1).tolist()
        assert solutions_of(puzzle, 6, limit=2) == [tokens.tolist()]


def test_sudoku_extra_givens() -> None:
    hard, easy = (Sudoku(size=6, extra_givens=extra).sample(30, seed=0) for extra in (0, 3))
    assert torch.equal(hard.tokens, easy.tokens)
    assert torch.equal(hard.free.sum(1) - 3, easy.free.sum(1))
    assert not (easy.free & ~hard.free).any(), "clues are only added"


def test_sudoku_maker(tmp_path: Path) -> None:
    path = make_sudoku(MakeSudoku(size=6, puzzles=12, seed=1, out=tmp_path))
    first = path.read_bytes()
    with np.load(path, allow_pickle=False) as data:
        solutions, given = data["solutions"], np.unpackbits(data["givens"], axis=1, count=36)
        rounds, test = data["rounds"], data["test"]
    assert 0 < test.sum() < len(test)
    for solution, clues, number in zip(solutions.tolist(), given.tolist(), rounds.tolist(), strict=True):
        when, _ = slow_singles(solution, [bool(c) for c in clues], 6)
        assert number == (0 if -1 in when else max(when))
        for cell in range(36):   # irreducible: without any one clue there is another solution
            if clues[cell]:
                fewer = [d if c and i != cell else -1 for i, (d, c) in enumerate(zip(solution, clues, strict=True))]
                assert len(solutions_of(fewer, 6, limit=2)) == 2
    make_sudoku(MakeSudoku(size=6, puzzles=12, seed=1, out=tmp_path))
    assert path.read_bytes() == first


def test_sudoku_maker_stops_at_min_givens() -> None:

    solver, rng = Solver(6), random.Random(0)
    puzzle = dig(solver, full_grid(solver, rng), rng, min_givens=20)
    assert sum(d > 0 for d in puzzle) == 20


def test_shape_of_boxes() -> None:
    assert Shape(6).unit_of_cell[2].view(6, 6)[:3].tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]]
