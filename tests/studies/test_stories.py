"""Stories against a reader who knows nothing but English: every answer, latent and free position, kind by kind."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch

from studies.tasks import Stories, load_task
from studies.tasks.stories_words import DIRECTIONS, KINDS, NAMES

TASKS = [
    Stories(),
    Stories(steps=3, distractors=2),
    Stories(kinds=("containers",), steps=6, containers=4),
    Stories(kinds=("possessions",), steps=6, people=4, things=6),
    Stories(kinds=("possessions", "directions"), steps=5, distractors=1, names=8),
    Stories(kinds=KINDS, steps=9, distractors=3, names=32, things=24, containers=12, people=4),
]
tasks = pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{'-'.join(task.kinds)}-{task.steps}")
QUARTERS = {"right": 1, "back": 2, "left": 3}


class Reader:
    """Keeps track of one story, sentence by sentence, and says what each one's answer should be."""

    def __init__(self) -> None:
        self.facing = self.thing = self.where = ""
        self.has: dict[str, str] = {}
        self.gender: dict[str, str] = {}   # of who turns, and of who carries

    def read(self, sentence: str) -> tuple[str | None, str | None]:
        """What the sentence is about, and its answer; None for what only tells how things stand, or nothing."""
        words = sentence.removeprefix("and then ").removesuffix(" .").split()
        match words:
            case [name, "faces", way]:
                self.facing, self.gender["directions"] = way, name
            case [name, "puts", "the", thing, "in", "the", box]:
                self.thing, self.where, self.gender["containers"] = thing, box, name
            case [name, "has", thing]:
                self.has[name] = thing
            case [name, "turns", how, "and", "smiles"]:
                assert name in NAMES
                assert name not in {*self.has, *self.gender.values()}, "somebody else"
                assert how in QUARTERS
                return "nothing", None
            case [who, "turns", how, "now", _]:
                self.right_pronoun(who, "directions")
                self.facing = DIRECTIONS[(DIRECTIONS.index(self.facing) + QUARTERS[how]) % 4]
                return "directions", self.facing
            case [who, "swaps", a, "with", b, "now", _]:
                self.right_pronoun(who, "containers")
                assert a != b
                self.where = b if self.where == a else a if self.where == b else self.where
                return "containers", self.where
            case [a, "swaps", "with", b, "now", "has", _]:
                assert a != b
                self.has[a], self.has[b] = self.has[b], self.has[a]
                return "possessions", self.has[a]
            case _:
                raise AssertionError(sentence)
        return None, None

    def right_pronoun(self, who: str, kind: str) -> None:
        assert who == ("he", "she")[NAMES.index(self.gender[kind]) % 2]


@tasks
def test_every_answer_is_what_a_reader_concludes(task: Stories) -> None:
    batch = task.sample(40, seed=0)
    latents = task.latents(batch.tokens)
    regions, names = task.regions(), task.position_names()
    for example in range(40):
        reader, place, count, asked = Reader(), 0, 0, Counter()
        order: list[str] = []
        for sentence in task.decode(batch.tokens[example]).splitlines():
            about, answer = reader.read(sentence)
            words = sentence.split()
            count += about is not None
            order = order if about else list(reader.has.values())
            for i, word in enumerate(words, start=place):
                assert regions[i] == count
                answers = about not in (None, "nothing") and i == place + len(words) - 2
                assert bool(batch.free[example, i]) == answers
                if answers:
                    assert word == answer
                    assert names[i] == f"sentence {count}, answer"
                if about:   # states at the opening: tested by those of the first sentences
                    if "directions" in task.kinds:
                        assert DIRECTIONS[latents["facing"].values[example, i]] == reader.facing
                    if "containers" in task.kinds:
                        found = task.words().index("in") + 1 + latents["place"].values[example, i]
                        assert task.words()[found] == reader.where
                    if "possessions" in task.kinds:
                        permutation = list(itertools.permutations(range(task.people)))[
                            latents["holdings"].values[example, i]]
                        assert [order[thing] for thing in permutation] == list(reader.has.values())
                    if "kind" in latents:
                        assert latents["kind"].values[example, i] == [*task.kinds, "nothing"].index(about)
            asked[about] += 1
            place += len(words)
        assert place == task.seq_len
        assert asked["nothing"] == task.distractors
        assert sum(asked[kind] for kind in KINDS) == task.steps
        assert len(set(reader.has)) == (task.people if "possessions" in task.kinds else 0)
        assert len(set(reader.has.values()) | {reader.thing} - {""}) == task.n_things, "each thing once"


def test_states_at_the_opening_are_the_first_ones() -> None:
    task = TASKS[-1]
    batch = task.sample(30, seed=1)
    latents = task.latents(batch.tokens)
    words = [[task.token_names()[token] for token in row] for row in batch.tokens.tolist()]
    for example in range(30):
        assert DIRECTIONS[latents["facing"].values[example, 0]] == words[example][2]
        assert task.words()[task.words().index("in") + 1 + latents["place"].values[example, 0]] == words[example][10]
    assert (latents["holdings"].values[:, :task.opening] == 0).all()
    assert (latents["kind"].values[:, :task.opening] == -1).all()


def test_all_turns_swaps_and_sentence_orders_occur() -> None:
    task = TASKS[-1]
    latents = task.latents(task.sample(400, seed=0).tokens)
    assert latents["holdings"].values.unique().tolist() == list(range(24)), "every way to share four things"
    assert latents["place"].values.unique().tolist() == list(range(12))
    kinds = latents["kind"].values[:, task.opening::task.width]
    for sentence in range(task.sentences):
        assert kinds[:, sentence].unique().tolist() == [0, 1, 2, 3], "distractors stand anywhere"
    counts = torch.bincount(kinds.flatten(), minlength=4)[:3] / kinds.numel()
    assert (counts - 0.25).abs().max() < 0.02, "kinds are as frequent"


def test_no_turn_can_be_answered_without_those_before_it() -> None:
    """The last direction is uniform given everything but one turn."""
    task = Stories(steps=6)
    batch = task.sample(4000, seed=0)
    facing = task.latents(batch.tokens)["facing"].values
    joint = torch.zeros(4, 4, 4)
    for first, second, last in zip(facing[:, 0], facing[:, task.opening], facing[:, -1], strict=True):
        joint[first, second, last] += 1
    for first in range(4):
        for second in set(range(4)) - {first}:   # every turn changes the direction
            share = joint[first, second] / joint[first, second].sum()
            assert (share - 0.25).abs().max() < 0.1
        assert joint[first, first].sum() == 0


def test_names_and_things_do_not_decide_the_split() -> None:
    """A story of the test split is not in training under other names."""
    task = Stories(steps=2, names=8)
    words = task.token_names()

    def plots(split: str) -> set[tuple[str, ...]]:
        told = ([words[token] for token in row] for row in task.sample(300, seed=0, split=split).tokens.tolist())
        return {tuple(word for word in story if word not in {*NAMES, "he", "she"}) for story in told}

    assert not plots("train") & plots("test")
    assert len(plots("train")) + len(plots("test")) > 30


def test_the_vocabulary_holds_what_is_used_and_no_more() -> None:
    for task in TASKS:
        tokens = torch.cat([task.sample(600, seed=seed).tokens for seed in range(3)])
        assert tokens.unique().tolist() == list(range(task.vocab_size - 1)), task


def test_kinds_from_json_are_the_same_task() -> None:
    task = TASKS[4]
    assert load_task({**task.to_dict(), "kinds": list(task.kinds)}) == task


@pytest.mark.parametrize(("values", "message"), [
    ({"kinds": ()}, "kinds must be one or more of directions, containers, possessions"),
    ({"kinds": ("weather",)}, r"not \['weather'\]"),
    ({"kinds": ("directions", "directions")}, "each once"),
    ({"steps": 0}, "steps must be at least 1"),
    ({"distractors": -1}, "distractors at least 0"),
    ({"people": 5}, "people must be 2..4"),
    ({"names": 3, "distractors": 1, "kinds": KINDS}, "names must be 6..100"),
    ({"things": 3, "names": 8, "kinds": KINDS}, "things must be 4..120"),
    ({"containers": 1}, "containers must be 2..12")])
def test_impossible_stories(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Stories(**values)


def test_what_is_no_story_is_refused() -> None:
    task = Stories(steps=2)
    text = task.decode(task.sample(1, seed=0).tokens[0])
    with pytest.raises(ValueError, match=r"a story of 16 words.*this has 15"):
        task.encode(text.replace(" now", "", 1))
    with pytest.raises(ValueError, match=r"\['sleeps'\] are not among its words"):
        task.encode(text.replace("turns", "sleeps", 1))
