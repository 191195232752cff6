"""The contract over all tasks, and each task's latents against a slow, independent reference."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM, LoopMDMConfig
from hooks.model.diffusion import corrupt
from studies.tasks import TASKS, Arithmetic, Automaton, Pointer, Sudoku, Task, Text, load_task
from studies.tasks import brown as brown_corpus
from studies.tasks.text import documents, is_test_document

SENTENCES = ("The people of the United States met the Congress.", "Peace is with us! Commerce, too, has grown.",
             "What remains? A debt of 1,000 dollars, the Secretary said.", "Our navy sails; the army stands.")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of documents, some of either split."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        order = np.random.default_rng(number).integers(0, 4, 12)
        (folder / f"speech{number}.txt").write_text("\n".join(f"In {1700 + number} {SENTENCES[i]}" for i in order))
    return str(folder)


SMALL: dict[str, dict[str, Any]] = {
    "automaton": {"rule": 110, "width": 7, "rows": 4},
    "sudoku": {"size": 6},
    "arithmetic": {"modulus": 5, "steps": 2},
    "pointer": {"keys": 4, "hops": 3, "min_keys": 2, "min_hops": 1},
    "stories": {"steps": 2, "distractors": 1, "names": 2},
    "text": {"length": 24},
}
"""One instance per task, small enough that train and test would collide if they were not kept apart."""


@pytest.fixture(params=sorted(TASKS))
def task(request: pytest.FixtureRequest, corpus: str) -> Task:
    values = dict(SMALL[request.param])
    if request.param == "text":
        values["corpus"] = corpus
    return load_task({"name": request.param, **values})


def rows(tokens: Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in tokens.tolist()}


# ------------------------------------------------------------------------------- the contract


def test_every_task_is_tested() -> None:
    assert set(SMALL) == set(TASKS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_sample(task: Task, split: str) -> None:
    batch = task.sample(9, seed=3, split=split)
    assert batch.tokens.shape == batch.free.shape == (9, task.seq_len)
    assert batch.tokens.dtype == torch.long
    assert batch.free.dtype == torch.bool
    assert batch.tokens.min() >= 0
    assert batch.tokens.max() < task.vocab_size, "tokens are in the vocabulary"
    assert not (batch.tokens == task.mask_token_id).any(), "clean examples hold no mask"
    assert batch.free.any(1).all(), "every example has something to fill in"
    again = task.sample(9, seed=3, split=split)
    assert torch.equal(batch.tokens, again.tokens)
    assert torch.equal(batch.free, again.free)
    assert not torch.equal(batch.tokens, task.sample(9, seed=4, split=split).tokens), "another seed, other data"
    torch.manual_seed(0)
    state = torch.get_rng_state()
    task.sample(2, seed=0, split=split)
    assert torch.equal(state, torch.get_rng_state()), "sampling leaves the global generator alone"


def test_unknown_split(task: Task) -> None:
    with pytest.raises(ValueError, match="split must be 'train' or 'test', not 'dev'"):
        task.sample(1, seed=0, split="dev")


def test_splits_share_nothing(task: Task) -> None:
    train, test, more = (rows(task.sample(400, seed=seed, split=split).tokens)
                         for seed, split in ((0, "train"), (0, "test"), (1, "train")))
    assert not train & test
    assert train & more or task.name == "sudoku", "small enough for chance to show an overlap"


def test_decode_and_encode(task: Task) -> None:
    batch = task.sample(40, seed=1)
    noised = corrupt(batch.tokens, 0.5, task.mask_token_id, free=batch.free, generator=torch.Generator().manual_seed(0))
    for example in (*batch.tokens, *noised):
        assert torch.equal(task.encode(task.decode(example)), example)
    with pytest.raises(ValueError, match=r"expect|needs"):
        task.encode("nonsense")


def test_names_regions_and_latents(task: Task) -> None:
    batch = task.sample(12, seed=0)
    assert len(task.token_names()) == task.vocab_size
    assert len(set(task.token_names())) == task.vocab_size
    assert len(task.position_names()) == task.seq_len
    assert task.grid_shape[0] * task.grid_shape[1] == task.seq_len
    assert task.regions().shape == (task.seq_len,)
    assert task.regions().unique().tolist() == list(range(int(task.regions().max()) + 1))
    latents = task.latents(batch.tokens, batch.free)
    assert set(task.latents(batch.tokens)) <= set(latents)
    assert next(iter(task.latents(batch.tokens))) == next(iter(latents)), "the main latent needs no clues"
    for latent in latents.values():
        assert latent.values.shape == batch.tokens.shape
        assert latent.values.min() >= -1
        assert latent.values.max() < latent.n_classes
        assert latent.values.unique().numel() > 1, "a latent that never varies is none"
        assert latent.description


def test_round_trip_as_json(task: Task) -> None:
    assert load_task(task.to_dict()) == task
    with pytest.raises(ValueError, match="has no fields"):
        load_task({**task.to_dict(), "colour": 1})


def test_model_defaults_make_a_model(task: Task) -> None:
    config = LoopMDMConfig(vocab_size=task.vocab_size, mask_token_id=task.mask_token_id, max_seq_len=task.seq_len,
                           **task.model_defaults())
    batch = task.sample(2, seed=0)
    logits = HookedLoopMDM(config)(batch.tokens, 2)
    assert logits.shape == (2, task.seq_len, task.vocab_size)
    assert config.max_loops > 1


def test_score(task: Task) -> None:
    batch = task.sample(5, seed=0)
    wrong = batch.tokens.clone()
    places = [int(free.nonzero()[0, 0]) for free in batch.free]
    for example in (1, 2):
        wrong[example, places[example]] = (wrong[example, places[example]] + 1) % (task.vocab_size - 1)
    score = task.score(wrong, batch)
    assert score["exact"].tolist() == [1, 0, 0, 1, 1]
    expected = 1 - torch.tensor([0, 1, 1, 0, 0]) / batch.free.sum(1)
    torch.testing.assert_close(score["cells"], expected)


def test_unknown_task() -> None:
    with pytest.raises(ValueError, match="no task is called 'chess'; there are "):
        load_task({"name": "chess"})


@pytest.mark.unchecked
@pytest.mark.parametrize(("kind", "values", "message"), [
    (Automaton, {"rule": 256}, "rule must be 0..255"),
    (Automaton, {"width": 2}, "width must be at least 3"),
    (Sudoku, {"size": 8}, "size must be 6 or 9"),
    (Sudoku, {"level": "evil"}, "level must be"),
    (Sudoku, {"size": 6, "symmetries": True}, "symmetries would turn training puzzles of size 6 into"),
    (Sudoku, {"extra_givens": 36}, "extra_givens must be 0..35"),
    (Arithmetic, {"modulus": 2}, "modulus must be 3..64"),
    (Arithmetic, {"steps": 26}, "steps must be 1..25"),
    (Pointer, {"keys": 1}, "keys must be"),
    (Pointer, {"keys": 8, "entities": 4}, "keys must be"),
    (Pointer, {"min_keys": 9}, "min_keys must be"),
    (Pointer, {"hops": 0}, "hops must be"),
    (Pointer, {"min_hops": 7}, "min_hops must be"),
    (Pointer, {"chains": 9}, "chains must be 1..8"),
    (Pointer, {"chains": 3, "min_keys": 2}, "chains must be 1..2"),
    (Text, {"length": 1}, "length must be at least 2"),
    (Text, {"length": 8, "train_tokens": 8}, "train_tokens must be 0, for all, or more than a window's 8, not 8"),
])
def test_impossible_difficulty(kind: type[Task], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


# ---------------------------------------------------------------------------------- automaton


def test_automaton_follows_its_rule() -> None:
    task = Automaton(rule=30, width=9, rows=5)
    batch = task.sample(20, seed=0)
    latents = task.latents(batch.tokens)
    grids, neighbourhoods = batch.tokens.view(-1, 5, 9).tolist(), latents["above"].values.view(-1, 5, 9)
    for example, above in zip(grids, neighbourhoods, strict=True):
        for row in range(1, 5):
            for column in range(9):
                left, centre, right = (example[row - 1][(column + d) % 9] for d in (-1, 0, 1))
                assert example[row][column] == left ^ (centre | right), "Rule 30 is left XOR (centre OR right)"
                assert above[row, column] == int(f"{left}{centre}{right}", 2)
    assert not batch.free.view(-1, 5, 9)[:, 0].any()
    assert batch.free.view(-1, 5, 9)[:, 1:].all()


# -------------------------------------------------------------------------- arithmetic, pointer


def test_arithmetic_against_python() -> None:
    task = Arithmetic(modulus=7, steps=5)
    batch = task.sample(30, seed=0)
    latents = task.latents(batch.tokens)
    for example in range(30):
        values: dict[str, int] = {}
        for number, line in enumerate(task.decode(batch.tokens[example]).splitlines()):
            label, *middle, result = line.split(" = ")
            if not middle:
                values[label] = int(result)
                continue
            whole = eval(middle[0], {}, dict(values))
            values[label] = whole % 7
            assert values[label] == int(result)
            place = 2 + 4 * (number - 1)
            for position in range(place, place + 4):
                assert latents["value"].values[example, position] == whole % 7
                assert latents["carry"].values[example, position] == whole // 7
                assert latents["before"].values[example, position] == values[middle[0][0]]
    names = np.array(task.position_names())
    assert set(names[batch.free[0].numpy()]) == {f"step {i}, result" for i in range(1, 6)}


def test_arithmetic_keeps_every_value_needed() -> None:
    """Factors are units: two chains that differ in their start differ in every result."""
    task = Arithmetic(modulus=8, steps=6)
    signs, operands = torch.tensor([[1, 0, 1, 1, 0, 1]] * 8), torch.tensor([[3, 4, 5, 7, 6, 3]] * 8)
    results = task.layout(torch.arange(8), signs, operands)[:, task.free_positions()]
    assert all(len(results[:, step].unique()) == 8 for step in range(6))
    assert task.factors == [3, 5, 7]


@pytest.mark.parametrize("task", [Pointer(5, 4), Pointer(6, 5, entities=9, min_keys=2, min_hops=1),
                                  Pointer(6, 4, chains=3), Pointer(6, 3, chains=2, min_keys=3, min_hops=1)], ids=str)
def test_pointer_against_a_dictionary(task: Pointer) -> None:
    batch = task.sample(60, seed=0)
    latents = task.latents(batch.tokens)
    lengths = set()
    for example in range(60):
        pairs, *chains = task.decode(batch.tokens[example]).split(" | ")
        f = dict(pair.split(">") for pair in pairs.split() if pair != "_>_")
        assert len(set(f.values())) == len(f), "a permutation"
        used: dict[str, int] = {}
        paths = [[entity for entity in chain.split() if entity != "_"] for chain in chains]
        assert len(paths) == len({path[0] for path in paths}) == task.chains, "starts differ"
        for place, hops in enumerate(paths):
            lengths.add((len(f), len(hops)))
            for hop, (before, after) in enumerate(pairwise(hops), start=1):
                assert f[before] == after
                used[before] = min(used.get(before, hop), hop)
            positions = slice(2 * task.keys + place * (task.hops + 1), 2 * task.keys + (place + 1) * (task.hops + 1))
            assert latents["hop"].values[example, positions].tolist() == [
                hop if hop < len(hops) else -1 for hop in range(task.hops + 1)]
            assert batch.free[example, positions].tolist() == [0 < hop < len(hops) for hop in range(task.hops + 1)]
        orbit = [paths[0][0]]
        while (entity := f[orbit[-1]]) != paths[0][0]:
            orbit.append(entity)
        assert set(orbit) == set(f), "one cycle through all keys"
        keys = [pair.split(">")[0] for pair in pairs.split()]
        assert latents["used_at"].values[example, :2 * task.keys:2].tolist() == [
            -1 if key == "_" else used.get(key, 0) for key in keys]
    assert len(lengths) > 8 if task.min_keys else len(lengths) == 1, "the curriculum mixes lengths"


def test_pointer_splits_by_function() -> None:
    """Neither where the chain starts nor the order of the pairs moves an example to the other split."""
    task = Pointer(4, 2)

    def functions(split: str) -> set[frozenset[str]]:
        decoded = [task.decode(tokens) for tokens in task.sample(300, seed=0, split=split).tokens]
        return {frozenset(text.split(" | ")[0].split()) for text in decoded}

    train, test = functions("train"), functions("test")
    assert not train & test
    assert len(train | test) == 6, "4 keys have 3! cycles"


# --------------------------------------------------------------------------------------- text


def test_text_places(corpus: str) -> None:
    task = Text(length=40, corpus=corpus)
    batch = task.sample(20, seed=0)
    latents, names = task.latents(batch.tokens), task.token_names()
    for example in range(20):
        signs = [names[token] for token in batch.tokens[example].tolist()]
        word = sentence = -1
        for position, sign in enumerate(signs):
            begins = sign.startswith("␣") or sign == "<end>"
            if begins and position and signs[position - 1].lstrip("␣") in (".", "!", "?", "<end>"):
                sentence = 0
            elif sentence >= 0:
                sentence += 1
            word = 0 if begins else word + 1 if word >= 0 else -1
            assert latents["word_place"].values[example, position] == min(word, 7)
            assert latents["sentence_place"].values[example, position] == min(sentence, 31)


def test_text_frequency(corpus: str) -> None:
    """The commonest token has class 0, and classes grow as counts fall."""
    task = Text(length=40, corpus=corpus)
    tokens = task.sample(400, seed=0).tokens
    classes = task.latents(tokens)["frequency"].values
    counts = torch.bincount(tokens.flatten(), minlength=task.vocab_size)
    mean = [float(counts[tokens[classes == c]].float().mean()) for c in classes.unique()]
    assert mean == sorted(mean, reverse=True)
    assert classes[tokens == counts.argmax()].unique().tolist() == [0]


def test_text_visibility(corpus: str) -> None:
    task = Text(length=30, corpus=corpus)
    tokens = task.sample(6, seed=0).tokens
    noised = corrupt(tokens, 0.7, task.mask_token_id, generator=torch.Generator().manual_seed(0))
    latents = task.visibility_latents(tokens, noised)
    for example in range(6):
        visible = [i for i in range(30) if noised[example, i] != task.mask_token_id]
        for position in range(30):
            nearest, seen = (latents[name].values[example, position] for name in ("nearest_visible", "seen_elsewhere"))
            if position in visible:
                assert nearest == seen == -1
            else:
                assert nearest == min(8, *(abs(position - i) for i in visible))
                assert seen == (tokens[example, position] in tokens[example, visible])


def test_text_in_bytes(corpus: str) -> None:
    task = Text(length=60, corpus=corpus, vocab=257)
    assert task.vocab_size == 258, "256 bytes, the end of a document, the mask"
    written = [" ".join(text.split()) for _, text in documents(corpus)]
    for tokens in task.sample(20, seed=0).tokens:
        parts = task.decode(tokens).split("<end>")
        assert sum(map(len, parts)) + len(parts) - 1 == 60, "a token is a character here, or an end"
        assert all(any(part.strip() in text for text in written) for part in parts)
    text = "Peace is with us! ■ Our navy sails; the army stands. In 1701"
    assert task.decode(task.encode(text)) == text


def test_part_of_a_text_is_read_again_and_again(corpus: str) -> None:
    """The part is of the training split, of more than its first documents, and tests are on the whole of theirs."""
    part, whole = (Text(length=40, corpus=corpus, vocab=257, train_tokens=most) for most in (1500, 0))

    def windows(task: Text, split: str) -> set[str]:
        return {task.decode(tokens) for seed in range(5) for tokens in task.sample(900, seed=seed, split=split).tokens}

    few, all_of_them = windows(part, "train"), windows(whole, "train")
    assert len(few) <= 1500 - 40 < len(all_of_them)
    assert torch.equal(part.sample(9, seed=0, split="test").tokens, whole.sample(9, seed=0, split="test").tokens)
    names = [name for name, _ in documents(corpus)]
    read = [name for name in names if any(f"In {1700 + int(name.removeprefix('speech'))} " in window for window in few)]
    assert 1 < len(read) < 8
    assert not any(is_test_document(name) for name in read)
    assert read != [name for name in names if not is_test_document(name)][:len(read)], "not simply the first ones"
    with pytest.raises(ValueError, match=r"train_tokens is 999999999, and the train split of .* has \d+ tokens"):
        Text(length=40, corpus=corpus, vocab=257, train_tokens=999_999_999).sample(1, seed=0)


def test_text_without_documents(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither 'sotu' nor a folder with .txt files"):
        Text(length=8, corpus=str(tmp_path)).sample(1, seed=0)


@pytest.mark.slow
def test_bundled_text() -> None:
    task = Text(length=64)
    tokens = task.sample(50, seed=0, split="test").tokens
    for example in tokens:
        assert torch.equal(task.encode(task.decode(example)), example)
    assert task.vocab_size == 2049
    assert any("Congress" in task.decode(example) for example in tokens)


BROWN = ("\n\n\tThe/at Fulton/np-tl County/nn-tl jury/nn said/vbd ``/`` no/at ''/'' ,/, and/cc he's/pps+bez gone/vbn "
         "to/to run/vb not/* 3/cd old/jj races/nns ./.\n\n")


def test_brown_tags(tmp_path: Path) -> None:
    (tmp_path / "ca01").write_text(BROWN * 30)
    (tmp_path / "README").write_text("not a text")
    assert brown_corpus.fetch(tmp_path) == tmp_path, "a corpus that is there is not fetched"
    [words] = brown_corpus.sentences(tmp_path / "ca01")[:1]
    text, _ = brown_corpus.tagged_text(words)
    assert text == 'The Fulton County jury said "no", and he\'s gone to run not 3 old races.'
    task = Text(length=40)
    tokens, pos = brown_corpus.tagged_windows(task, tmp_path, n=20, seed=0)
    assert tokens.shape == pos.values.shape == (20, 40)
    expected = {"The": "determiner", "Fulton": "noun", "said": "verb", "no": "determiner", '"': "punctuation",
                "and": "conjunction", "gone": "verb", "to": "particle", "not": "particle", "3": "number",
                "old": "adjective", "races": "noun", ".": "punctuation", ",": "punctuation", "he's": "pronoun"}
    names, checked = task.token_names(), set()
    for sign_ids, classes in zip(tokens.tolist(), pos.values.tolist(), strict=True):
        for token, number in zip(sign_ids, classes, strict=True):
            sign = names[token].lstrip("␣")
            if sign in expected:
                assert brown_corpus.CLASSES[number] == expected[sign], sign
                checked.add(sign)
    assert len(checked) >= 8


@pytest.mark.parametrize(("tag", "expected"), [
    ("nn-tl-hl", "noun"), ("ppss+bem", "pronoun"), ("pp$", "determiner"), ("bedz*", "verb"), ("*", "particle"),
    ("``", "punctuation"), ("fw-nn", "other"), ("wdt", "determiner"), ("in-tl", "adposition"), ("zzz", "other")])
def test_brown_classes(tag: str, expected: str) -> None:
    assert brown_corpus.universal(tag) == expected
