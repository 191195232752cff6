"""The choices study: each choice changes what it names and nothing else, and its sentences follow from its rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from probes.cycles import own_loops
from probes.exchange import exchange
from studies.choices import Choices, main
from studies.questions.choices.measure import CHOICES, Sizes, deciles, tau_under
from studies.questions.choices.page import page, words
from studies.questions.stage_test.subjects import Examples, task_examples
from studies.results import RESULTS
from studies.tasks import Automaton
from studies.zoo import ZOO, load
from tests.small import small_model

ROWS = [{"subject": "a", "choice": "as the test has it", "value": 0.9, "each": [0.8, 1.0]},
        {"subject": "b", "choice": "as the test has it", "value": 0.1, "each": [0.1]},
        {"subject": "a", "choice": "all masked", "value": 0.8, "each": [0.8]},
        {"subject": "b", "choice": "all masked", "value": 0.3, "each": [0.3]}]


def test_sentences_name_the_largest_move_and_its_sign() -> None:
    assert words(ROWS) == ["All masked: moves τ by +0.20 at most (b)."]
    lower = [*ROWS[:3], {**ROWS[3], "value": -0.3}]
    assert words(lower) == ["All masked: moves τ by -0.40 at most (b)."]
    text = page(ROWS, command="a command")
    assert "| as the test has it | t = 0.9, a clock per role, KL | 0.90 [0.80, 1.00] | 0.10 |" in text


def test_mean_tau_is_the_definition_by_hand() -> None:
    entry = load(ZOO / "automaton-loop")
    model, drawn = entry.model, task_examples(entry.task, 16, 0, (0.9,))
    sizes = Sizes(examples=16, n_loops=4)

    def examples(n: int, seed: int, choice: str) -> Examples:
        assert (n, seed) == (16, 0)
        return drawn

    found = exchange(model, drawn.inputs, own_loops(model.topology(4)), scored=drawn.scored, t=drawn.t)
    kl, work = found.kl.mean("example").values, found.work.mean("example").values
    pairs = [(k, j) for k in (1, 2, 3) for j in (1, 2, 3) if k != j]
    expected = sum(work[k] * np.clip(1 - kl[k, j] / work[k], -1, 1) for k, j in pairs) / sum(work[k] for k, _ in pairs)
    assert tau_under("as the test has it", model, examples, sizes)[0] == pytest.approx(expected)
    values = {choice: tau_under(choice, model, examples, sizes)[0] for choice in CHOICES if "examples" not in choice}
    assert len({round(value, 6) for name, value in values.items() if name not in ("all masked", "random masks")}) == 5
    assert values["content of another example"] < 0.2 < expected


def test_deciles_group_scored_positions_by_confidence_and_leave_the_others_together() -> None:
    model, task = small_model(2, vocab_size=3, mask_token_id=2, max_seq_len=24), Automaton(rule=30, width=6, rows=4)
    drawn = task_examples(task, 20, 0, (0.9,))
    groups = deciles(model, drawn, 4)
    assert set(groups[~drawn.scored].tolist()) == {0}
    counts = torch.bincount(groups[drawn.scored])[1:]
    assert len(counts) == 10
    assert int(counts.max()) <= 1.5 * int(counts.min())


def test_nothing_to_measure_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = Choices(zoo=tmp_path, codecs=tmp_path, results=tmp_path / "results")
    assert main(args) == 2
    assert "hold none of the models" in capsys.readouterr().err


def test_the_bundled_page_is_that_of_the_bundled_rows() -> None:
    rows = json.loads((RESULTS / "choices.json").read_text())
    assert (RESULTS / "choices.md").read_text() == page(rows, command="python studies/choices.py")
    assert {row["choice"] for row in rows} == set(CHOICES)
