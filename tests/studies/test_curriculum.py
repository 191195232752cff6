"""The curriculum of pointer chains: how examples grow, that training draws them by the FLOPs spent, and what is counted
by hop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from studies.tasks import Automaton, Batch, Pointer, Task
from studies.training.draws import draw_examples
from studies.training.evaluation import by_region, held_out
from studies.training.flops import training_flops
from studies.training.run import TrainConfig, TrainingRun, train
from studies.training.step import World
from tests.small import small_model

TASK = Pointer(keys=8, hops=4, entities=12, chains=2)
MODEL = {"d_model": 16, "n_heads": 2, "d_mlp": 32, "max_loops": 3, "position": "both"}


def sizes(task: Pointer, batch: Batch) -> set[tuple[int, int]]:
    """(pairs, hops) of each example, counted in its text; chains of one example are equally long."""
    found = set()
    for tokens, free in zip(batch.tokens, batch.free, strict=True):
        pairs, *chains = task.decode(tokens).split(" | ")
        filled = {len([name for name in chain.split() if name != "_"]) - 1 for chain in chains}
        assert len(filled) == 1
        [hops] = filled
        assert int(free.sum()) == task.chains * hops, "what is blank is not asked for"
        found.add((sum(pair != "_>_" for pair in pairs.split()), hops))
    return found


@pytest.mark.parametrize(("grown", "expected"), [
    (0.0, (4, 1)), (0.2, (4, 1)), (0.29, (4, 1)), (0.31, (5, 1)), (0.34, (5, 2)), (0.59, (6, 2)), (0.61, (6, 3)),
    (0.91, (8, 4)), (1.0, (8, 4))])
def test_keys_and_hops_grow_evenly_to_the_tasks(grown: float, expected: tuple[int, int]) -> None:
    assert sizes(TASK, TASK.curriculum(40, seed=1, grown=grown)) == {expected}


def test_where_there_are_minima_lengths_are_mixed_from_there() -> None:
    task = replace(TASK, min_keys=5, min_hops=2)
    assert sizes(task, task.curriculum(60, seed=1, grown=0.0)) == {(5, 2)}
    assert sizes(task, task.curriculum(200, seed=1, grown=0.61)) == {(keys, hops) for keys in (5, 6, 7)
                                                                   for hops in (2, 3)}


def test_small_tasks_grow_from_what_they_have() -> None:
    assert sizes(Pointer(keys=3, hops=2), Pointer(keys=3, hops=2).curriculum(20, seed=0, grown=0.0)) == {(3, 1)}
    wide = Pointer(keys=8, hops=2, chains=6)
    assert sizes(wide, wide.curriculum(20, seed=0, grown=0.0)) == {(6, 1)}, "each chain has a start of its own"


def test_easy_examples_are_chains_of_their_pairs_and_of_the_training_split() -> None:
    batch = TASK.curriculum(60, seed=2, grown=0.4)
    assert batch.tokens.shape == (60, TASK.seq_len)
    for tokens in batch.tokens:
        pairs, *chains = TASK.decode(tokens).split(" | ")
        f = dict(pair.split(">") for pair in pairs.split() if pair != "_>_")
        assert set(f) == set(f.values())
        for chain in chains:
            start, *hops = [name for name in chain.split() if name != "_"]
            for hop in hops:
                assert f[start] == hop
                start = hop
    small = Pointer(keys=4, hops=2, chains=2)
    easy, test = ({frozenset(small.decode(tokens).split(" | ")[0].split()) for tokens in found.tokens}
                  for found in (small.curriculum(200, seed=0, grown=0.0), small.sample(200, seed=0, split="test")))
    assert not easy & test
    assert len(easy | test) == 6, "4 keys have 3! cycles: these are all"


def test_the_curriculum_ends_in_the_tasks_own_examples() -> None:
    for task in (TASK, replace(TASK, min_keys=4, min_hops=1)):
        grown, own = task.curriculum(20, seed=3, grown=1.0), task.sample(20, seed=3)
        assert torch.equal(grown.tokens, own.tokens)
        assert torch.equal(grown.free, own.free)


def test_another_chain_excludes_its_own_cell_and_nothing_else() -> None:
    """With two chains, a hop's cell leaves the other chain's seven keys, all alike: no permutation to complete."""
    batch = TASK.sample(6000, seed=0)
    entity = batch.tokens[:, 2 * TASK.keys:].view(-1, 2, TASK.hops + 1)
    keys = batch.tokens[:, :2 * TASK.keys:2].sort(1).values
    first, second = ((keys == entity[:, chain, 2, None]).int().argmax(1) for chain in (0, 1))
    for place in range(TASK.keys):
        rest = torch.bincount(second[first == place], minlength=TASK.keys) / int((first == place).sum())
        assert rest[place] == 0
        assert (rest[torch.arange(TASK.keys) != place] - 1 / 7).abs().max() < 0.06


@pytest.mark.parametrize(("spent", "grown"), [(0.0, 0.0), (0.2, 0.4), (0.5, 1.0), (0.9, 1.0)])
def test_training_reaches_the_whole_task_at_half_of_its_budget(spent: float, grown: float) -> None:
    found = draw_examples(TASK, 10, 5, curriculum="growth", spent=spent)
    assert torch.equal(found.tokens, TASK.curriculum(10, seed=5, grown=grown).tokens)
    without = draw_examples(TASK, 10, 5, curriculum="none", spent=spent)
    assert torch.equal(without.tokens, TASK.sample(10, seed=5).tokens)


def test_what_has_no_curriculum_says_so() -> None:
    task: Task = Automaton(width=5, rows=3)
    assert TASK.has_curriculum
    assert not task.has_curriculum
    with pytest.raises(ValueError, match="'automaton' has no curriculum: train it with curriculum='none'"):
        task.curriculum(2, seed=0, grown=0.5)
    with pytest.raises(ValueError, match=r"'automaton' has no curriculum: curriculum must be 'none'"):
        TrainConfig(task=task, curriculum="growth")
    with pytest.raises(ValueError, match=r"grown must be 0\.\.1, not 1\.5"):
        TASK.curriculum(2, seed=0, grown=1.5)


# ---------------------------------------------------------------------------------- in training


def config_of(out: Path, **changes: Any) -> TrainConfig:
    base = TrainConfig(task=TASK, model=MODEL, curriculum="growth", masks="exact", loops_drawn="growth", batch_size=4,
                       warmup_steps=2, eval_every=3, eval_examples=8, out=str(out), threads=1)
    flops = training_flops(base.model_config(), seq_len=TASK.seq_len, n_loops=2)
    return replace(base, **{"budget_flops": 12 * 4 * flops, **changes})


@pytest.mark.parametrize("kind", ["loop", "twin", "deep"])
def test_a_run_trains_on_examples_that_grow_with_the_flops_it_has_spent(tmp_path: Path, kind: str,
                                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    run = TrainingRun(config_of(tmp_path, kind=kind, seed=7), World())
    seen: list[tuple[float, Batch]] = []
    backward = run.gradient.backward

    def noted(batch: Batch, *rest: Any) -> float:
        seen.append((run.flops / run.config.budget_flops, batch))
        return backward(batch, *rest)

    monkeypatch.setattr(run.gradient, "backward", noted)
    while run.flops < run.config.budget_flops:
        run.step_once()
    for step, (spent, batch) in enumerate(seen):
        expected = TASK.curriculum(4, seed=7 * 1_000_003 + step, grown=min(1.0, 2 * spent))
        assert torch.equal(batch.tokens, expected.tokens), step
        assert torch.equal(batch.free, expected.free)
    assert sizes(TASK, seen[0][1]) == {(4, 1)}
    assert sizes(TASK, seen[-1][1]) == {(8, 4)}
    assert len({tuple(sizes(TASK, batch)) for _, batch in seen}) >= 4


def test_a_growing_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    whole = train(config_of(tmp_path / "a"), progress=False)
    calls = 0
    while not (part := train(config_of(tmp_path / "b", time_budget_s=0.0), progress=False)).finished:
        calls += 1
    assert calls > 8
    assert part.flops == whole.flops
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, part.model.state_dict()[name]), name
    with pytest.raises(ValueError, match="belongs to a run with another curriculum"):
        train(config_of(tmp_path / "b", curriculum="none"), progress=False)


# -------------------------------------------------------------------------------- counted by hop


def test_cells_are_counted_by_hop() -> None:
    task = replace(TASK, min_hops=1)
    batch = task.sample(30, seed=0)
    predicted = batch.tokens.clone()
    generator = torch.Generator().manual_seed(0)
    predicted[torch.rand(predicted.shape, generator=generator) < 0.4] = task.blank_id   # never an answer
    found = by_region(predicted, batch, task.regions())
    names = task.position_names()
    for hop in range(1, 5):
        places = [i for i, name in enumerate(names) if name.endswith(f"hop {hop}")]
        cells = [(e, i) for e in range(30) for i in places if batch.free[e, i]]
        hits = sum(int(predicted[e, i] == batch.tokens[e, i]) for e, i in cells)
        assert found[hop] == pytest.approx(hits / len(cells))
        assert 0 < hits < len(cells)
    assert set(found) == {1, 2, 3, 4}, "the pairs and starts are given"
    assert len(set(found.values())) == 4


def test_held_out_tells_each_hop_with_everything_masked_after_all_loops() -> None:
    model = small_model(vocab_size=TASK.vocab_size, mask_token_id=TASK.mask_token_id, max_seq_len=TASK.seq_len,
                        max_loops=3)
    row = held_out(model, TASK, examples=40)
    batch = TASK.sample(40, seed=0, split="test")
    with torch.no_grad():
        predicted = model(batch.tokens.masked_fill(batch.free, TASK.mask_token_id), 3, t=1.0).argmax(-1)
    expected = by_region(predicted, batch, TASK.regions())
    assert {key: value for key, value in row.items() if key.startswith("cells_")} == {
        f"cells_hop{hop}@3": share for hop, share in expected.items()}
    assert row["cells@3"] == pytest.approx(sum(expected.values()) / 4), "as many cells of each hop"
    assert sum(expected.values()) > 0
