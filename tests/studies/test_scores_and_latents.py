"""Scores count free positions only, and an automaton's latents are read off its grid cell by cell."""

from __future__ import annotations

import pytest
import torch

from studies.tasks import Arithmetic, Automaton, Pointer, Stories, Sudoku, Task, load_task

TASKS: list[Task] = [Automaton(rule=30, width=7, rows=4), Arithmetic(modulus=5, steps=3), Pointer(keys=4, hops=2),
                     Sudoku(size=6), Stories(steps=3)]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_given_positions_have_no_say_in_scores(task: Task) -> None:
    batch = task.sample(6, seed=0)
    other = (batch.tokens + 1) % (task.vocab_size - 1)
    assert (~batch.free).any(1).all(), "something is given in each"
    given_wrong = task.score(torch.where(batch.free, batch.tokens, other), batch)
    assert given_wrong["exact"].tolist() == given_wrong["cells"].tolist() == [1] * 6
    free_wrong = task.score(torch.where(batch.free, other, batch.tokens), batch)
    assert free_wrong["exact"].tolist() == free_wrong["cells"].tolist() == [0] * 6
    half = batch.free & (batch.free.cumsum(1) <= batch.free.sum(1, keepdim=True) // 2)
    share = task.score(torch.where(half, other, batch.tokens), batch)
    assert share["exact"].tolist() == [0] * 6
    torch.testing.assert_close(share["cells"], 1 - half.sum(1) / batch.free.sum(1))


@pytest.mark.parametrize("rule", [30, 90, 204])
def test_latents_of_an_automaton_cell_by_cell(rule: int) -> None:
    task = Automaton(rule=rule, width=7, rows=4)
    tokens = task.sample(20, seed=1).tokens
    grids, latents = tokens.view(-1, 4, 7).tolist(), task.latents(tokens)
    found = {name: latents[name].values.view(-1, 4, 7).tolist() for name in ("cell", "above", "below")}
    for example, grid in enumerate(grids):
        for row in range(4):
            for column in range(7):
                assert found["cell"][example][row][column] == grid[row][column]
                assert found["below"][example][row][column] == (grid[row + 1][column] if row < 3 else -1)
                three = [grid[row - 1][(column + step) % 7] for step in (-1, 0, 1)] if row else None
                number = -1 if three is None else 4 * three[0] + 2 * three[1] + three[2]
                assert found["above"][example][row][column] == number
                if row:
                    assert grid[row][column] == rule >> number & 1


def test_a_task_from_json_is_the_same_and_can_be_a_key() -> None:
    task = Stories(kinds=("directions", "containers"), steps=3)
    again = load_task({**task.to_dict(), "kinds": list(task.kinds)})
    assert {task: 1}[again] == 1
