"""Short English stories in which something changes sentence by sentence, and must be kept track of.

After a few sentences that say how things stand, every further one changes one thing and says what it has come to,
which is to be filled in. Three kinds: **directions** (a person turns: a sum modulo 4), **containers** (two boxes are
swapped, one of which may hold the thing asked for) and **possessions** (two people swap what they have; swaps do not
commute). No sentence can be answered without all those before it, so a model has to go through them, be it loop by
loop or layer by layer; counting words is not enough.

    >>> print(Stories(steps=3).decode(Stories(steps=3).sample(1, seed=0).tokens[0]))
    Tom faces east .
    he turns left now north .
    he turns left now west .
    he turns left now south .

The layout is fixed: every sentence of a step has the same number of words, with its answer last but one, so that
shorter kinds begin with "and then" beside longer ones. ``distractors`` puts sentences between the steps in which
somebody else turns; they change nothing and ask nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from studies.tasks.contract import Batch, Latent, Task
from studies.tasks.stories_words import CONTAINERS, DIRECTIONS, ITEMS, KINDS, NAMES, TURNS, WIDTH

MASK_SIGN = "■"


@dataclass(frozen=True)
class Stories(Task):
    """Stories of ``steps`` changes, each of one of ``kinds``.

    A quarter of all stories, chosen by a hash of how they begin and of their changes, is kept for testing.
    """

    name: ClassVar[str] = "stories"
    region_name: ClassVar[str] = "sentence"

    kinds: tuple[str, ...] = ("directions",)  # what a story keeps track of; several are told side by side
    steps: int = 8                   # sentences that change something
    distractors: int = 0             # sentences between them that do not
    names: int = 4                   # people to choose from
    things: int = 4                  # things to choose from, in containers and possessions
    containers: int = 3              # containers that are swapped
    people: int = 3                  # people who swap their possessions, 2..4

    def __post_init__(self) -> None:
        if not self.kinds or set(self.kinds) - set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"kinds must be one or more of {', '.join(KINDS)}, each once, not {list(self.kinds)}.")
        if self.steps < 1 or self.distractors < 0:
            raise ValueError(f"steps must be at least 1 and distractors at least 0, not {self.steps} and "
                             f"{self.distractors}.")
        if not 2 <= self.people <= 4:
            raise ValueError(f"people must be 2..4, not {self.people}.")
        if not self.n_persons <= self.names <= len(NAMES):
            raise ValueError(f"names must be {self.n_persons}..{len(NAMES)}, enough for the people in a story, "
                             f"not {self.names}.")
        if not self.n_things <= self.things <= len(ITEMS):
            raise ValueError(f"things must be {self.n_things}..{len(ITEMS)}, enough for a story, not {self.things}.")
        if not 2 <= self.containers <= len(CONTAINERS):
            raise ValueError(f"containers must be 2..{len(CONTAINERS)}, not {self.containers}.")

    # ------------------------------------------------------------------------------ sizes

    @property
    def n_persons(self) -> int:
        """People in one story: who turns, who carries the containers, who swaps, who distracts."""
        return (("directions" in self.kinds) + ("containers" in self.kinds)
                + ("possessions" in self.kinds) * self.people + (self.distractors > 0))

    @property
    def n_things(self) -> int:
        """Things in one story."""
        return ("containers" in self.kinds) + ("possessions" in self.kinds) * self.people

    @property
    def vocab_size(self) -> int:
        return len(self.words()) + 1

    @property
    def width(self) -> int:
        """Words in the sentence of a step."""
        return max(WIDTH[kind] for kind in self.kinds)

    @property
    def opening(self) -> int:
        """Words that say how things stand at first."""
        lengths = {"directions": 4, "containers": 8, "possessions": 4 * self.people}
        return sum(lengths[kind] for kind in self.kinds)

    @property
    def sentences(self) -> int:
        """Sentences after the opening."""
        return self.steps + self.distractors

    @property
    def seq_len(self) -> int:
        return self.opening + self.sentences * self.width

    def words(self) -> list[str]:
        """The vocabulary without the mask: what the kinds in use need, each word once."""
        turning = "directions" in self.kinds or self.distractors > 0
        swapping = bool({"containers", "possessions"} & set(self.kinds))
        used = [".", "now", *NAMES[:self.names]]
        used += ["he", "she"] if {"directions", "containers"} & set(self.kinds) else []
        used += ["faces", *DIRECTIONS] if "directions" in self.kinds else []
        used += ["turns", *TURNS] if turning else []
        used += ["puts", "the", "in", *CONTAINERS[:self.containers]] if "containers" in self.kinds else []
        used += ["swaps", "with", *ITEMS[:self.things]] if swapping else []
        used += ["has"] if "possessions" in self.kinds else []
        used += ["and", "smiles"] if self.distractors else []
        used += ["and", "then"] if turning and swapping else []
        return list(dict.fromkeys(used))

    # ------------------------------------------------------------------------------ examples

    def sample(self, n: int, seed: int, split: str = "train") -> Batch:
        if split not in ("train", "test"):
            raise ValueError(f"split must be 'train' or 'test', not {split!r}.")
        generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
        tokens = torch.empty(0, self.seq_len, dtype=torch.long)
        free = torch.empty(0, self.seq_len, dtype=torch.bool)
        while len(tokens) < n:
            plot = self._draw(4 * n + 8, generator)
            of_split = self._is_test(plot) == (split == "test")
            chosen = plot.only(of_split & (of_split.cumsum(0) <= n - len(tokens)))   # telling takes longest
            tokens = torch.cat([tokens, self._tell(chosen)])
            answers = torch.zeros(len(chosen.kind), self.sentences, self.width, dtype=torch.bool)
            answers[..., -2] = chosen.kind >= 0
            given = torch.zeros(len(answers), self.opening, dtype=torch.bool)
            free = torch.cat([free, torch.cat([given, answers.flatten(1)], 1)])
        return Batch(tokens, free)

    def latents(self, tokens: Int[Tensor, "example pos"],
                free: Bool[Tensor, "example pos"] | None = None) -> Mapping[str, Latent]:
        plot = self._read(tokens)
        course = _follow(plot)
        orders = {order: i for i, order in enumerate(itertools.permutations(range(self.people)))}
        place = torch.tensor([self.people ** i for i in range(self.people)])
        number = torch.zeros(self.people ** self.people, dtype=torch.long)
        for order, i in orders.items():
            number[(torch.tensor(order) * place).sum()] = i
        every = {
            "directions": ("facing", course.facing, 4, "where the person who turns faces"),
            "containers": ("place", course.place, self.containers, "the container that holds the thing"),
            "possessions": ("holdings", number[(course.owned * place).sum(-1)], len(orders),
                            "who has what, as the number of a permutation"),
        }
        found = {name: Latent(self._spread(values), n_classes, f"{text}, after the sentence that the position is in")
                 for name, values, n_classes, text in (every[kind] for kind in self.kinds)}
        if len(self.kinds) + (self.distractors > 0) > 1:
            kind = torch.where(plot.kind < 0, len(self.kinds), plot.kind)
            opening = torch.full_like(kind[:, :1], -1)
            found["kind"] = Latent(self._spread(torch.cat([opening, kind], 1)), len(self.kinds) + 1,
                                   f"what the sentence is about: {', '.join(self.kinds)}, or nothing that matters")
        return found

    def regions(self) -> Int[Tensor, "pos"]:
        return self._spread(torch.arange(self.sentences + 1)[None])[0]

    def decode(self, tokens: Int[Tensor, "pos"]) -> str:
        names = self.token_names()
        return " ".join(names[token] for token in tokens.tolist()).replace(" . ", " .\n")

    def encode(self, text: str) -> Int[Tensor, "pos"]:
        ids, words = self._ids(), text.split()
        if len(words) != self.seq_len or (unknown := sorted(set(words) - set(ids))):
            wrong = f"{unknown} are not among its words" if len(words) == self.seq_len else f"this has {len(words)}"
            raise ValueError(f"expected a story of {self.seq_len} words, full stops and answers included "
                             f"({MASK_SIGN} where masked); {wrong}.")
        return torch.tensor([ids[word] for word in words])

    def token_names(self) -> list[str]:
        return [*self.words(), MASK_SIGN]

    def position_names(self) -> list[str]:
        opening = [f"opening, word {i + 1}" for i in range(self.opening)]
        what = [f"word {i + 1}" for i in range(self.width - 2)] + ["answer", "full stop"]
        return opening + [f"sentence {i + 1}, {name}" for i in range(self.sentences) for name in what]

    def model_defaults(self) -> dict[str, Any]:
        return {"d_model": 32, "n_heads": 4, "d_mlp": 128, "n_head_layers": 1, "n_loop_layers": 1,
                "n_tail_layers": 1, "max_loops": 8, "position": "rotary", "rotary_base": 100.0, "qk_norm": True}

    # -------------------------------------------------------------------------- private

    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.token_names())}

    def _spread(self, values: Int[Tensor, "example part"]) -> Int[Tensor, "example pos"]:
        """Values of the opening and of each sentence, at each of their words."""
        return torch.cat([values[:, :1].expand(-1, self.opening), values[:, 1:].repeat_interleave(self.width, 1)], 1)

    def _draw(self, n: int, generator: torch.Generator) -> _Plot:
        """Any stories, of either split."""
        shape = n, self.sentences

        def whole(upper: int, size: tuple[int, ...] = shape) -> Tensor:
            return torch.randint(0, upper, size, generator=generator)

        def pairs(upper: int) -> Tensor:
            first = whole(upper)
            return torch.stack([first, (first + 1 + whole(upper - 1)) % upper], -1)

        kind = whole(len(self.kinds))
        if self.distractors:
            rank = torch.rand(shape, generator=generator).argsort(1)
            kind = kind.masked_fill(rank < self.distractors, -1)
        return _Plot(
            persons=torch.rand(n, self.names, generator=generator).argsort(1)[:, :self.n_persons],
            things=torch.rand(n, self.things, generator=generator).argsort(1)[:, :self.n_things],
            facing=whole(4, (n,)), place=whole(self.containers, (n,)), kind=kind, about=self._about(kind),
            turn=whole(len(TURNS)), containers=pairs(self.containers), people=pairs(self.people), n_people=self.people)

    def _about(self, kind: Int[Tensor, "example sentence"]) -> Int[Tensor, "example sentence"]:
        """Places in `KINDS` of what sentences are about; −1 of distractors."""
        return torch.tensor([*(KINDS.index(k) for k in self.kinds), -1])[kind]

    def _tell(self, plot: _Plot) -> Int[Tensor, "example pos"]:
        """Stories as tokens."""
        ids, n = self._ids(), len(plot.kind)
        name, item, box, way, how = (torch.tensor([ids.get(word, 0) for word in words])
                                     for words in (NAMES, ITEMS, CONTAINERS, DIRECTIONS, TURNS))
        course = _follow(plot)
        roles = self._roles()

        def pronoun(role: int) -> Tensor:
            return torch.where(plot.persons[:, role] % 2 == 0, ids.get("he", 0), ids.get("she", 0))

        def line(*parts: str | Tensor) -> Tensor:
            columns = [torch.full((n,), ids[part]) if isinstance(part, str) else part for part in parts]
            return torch.stack(columns, 1)

        opening = []
        if "directions" in self.kinds:
            opening.append(line(name[plot.persons[:, roles["turns"]]], "faces", way[plot.facing], "."))
        if "containers" in self.kinds:
            opening.append(line(name[plot.persons[:, roles["carries"]]], "puts", "the", item[plot.things[:, 0]], "in",
                                "the", box[plot.place], "."))
        things = plot.things[:, int("containers" in self.kinds):]
        if "possessions" in self.kinds:
            people = plot.persons[:, roles["swap"]:roles["swap"] + self.people]
            opening += [line(name[people[:, i]], "has", item[things[:, i]], ".") for i in range(self.people)]
        sentences = []
        for s in range(self.sentences):
            versions = {}
            lead = ["and", "then"] if self.width > WIDTH["directions"] else []
            if "directions" in self.kinds:
                versions["directions"] = line(*lead, pronoun(roles["turns"]), "turns", how[plot.turn[:, s]], "now",
                                              way[course.facing[:, s + 1]], ".")
            if "containers" in self.kinds:
                a, b = plot.containers[:, s].unbind(-1)
                versions["containers"] = line(pronoun(roles["carries"]), "swaps", box[a], "with", box[b], "now",
                                              box[course.place[:, s + 1]], ".")
            if "possessions" in self.kinds:
                a, b = plot.people[:, s].unbind(-1)
                owned = course.owned[:, s + 1].gather(1, a[:, None])[:, 0]
                thing = things.gather(1, owned[:, None])[:, 0]
                versions["possessions"] = line(name[people.gather(1, a[:, None])[:, 0]], "swaps", "with",
                                               name[people.gather(1, b[:, None])[:, 0]], "now", "has", item[thing], ".")
            text = torch.stack([versions[kind] for kind in self.kinds], 1)
            chosen = text[torch.arange(n), plot.kind[:, s].clamp_min(0)]
            if self.distractors:
                aside = line(*lead, name[plot.persons[:, roles["distracts"]]], "turns", how[plot.turn[:, s]], "and",
                             "smiles", ".")
                chosen = torch.where((plot.kind[:, s] < 0)[:, None], aside, chosen)
            sentences.append(chosen)
        return torch.cat([*opening, *sentences], 1)

    def _roles(self) -> dict[str, int]:
        """Places of a story's persons in its list of them; of the first one where they are several."""
        roles, at = {}, 0
        for role, kind, count in (("turns", "directions", 1), ("carries", "containers", 1),
                                  ("swap", "possessions", self.people)):
            if kind in self.kinds:
                roles[role], at = at, at + count
        return {**roles, "distracts": at}

    def _read(self, tokens: Int[Tensor, "example pos"]) -> _Plot:
        """The inverse of `_tell`, for clean stories, as far as states depend on it."""
        ids, n = self._ids(), len(tokens)

        def index(words: tuple[str, ...]) -> Tensor:
            table = torch.full((self.vocab_size,), -1)
            for i, word in enumerate(words):
                if word in ids:
                    table[ids[word]] = i
            return table

        way, box, how, item = index(DIRECTIONS), index(CONTAINERS), index(TURNS), index(ITEMS)
        text = tokens[:, self.opening:].unflatten(1, (self.sentences, self.width))
        answer = text[..., -2]
        meaning = {"directions": way, "containers": box, "possessions": item}
        kind = torch.full_like(answer, -1)
        for i, name in enumerate(self.kinds):
            kind = torch.where(meaning[name][answer] >= 0, i, kind)
        at, facing, place = 0, torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.long)
        if "directions" in self.kinds:
            facing, at = way[tokens[:, at + 2]], at + 4
        if "containers" in self.kinds:
            place, at = box[tokens[:, at + 6]], at + 8
        pairs = torch.zeros(n, self.sentences, 2, dtype=torch.long)
        people, containers = pairs, pairs
        if "possessions" in self.kinds:
            names = tokens[:, at:at + 4 * self.people:4]
            people = (text[..., [0, 3], None] == names[:, None, None]).int().argmax(-1)
        if "containers" in self.kinds:
            containers = box[text[..., [2, 4]]]
        return _Plot(persons=pairs[:, 0, :0], things=pairs[:, 0, :0], facing=facing, place=place, kind=kind,
                     about=self._about(kind), turn=how[text[..., -4]], containers=containers, people=people,
                     n_people=self.people)

    def _is_test(self, plot: _Plot) -> Bool[Tensor, "example"]:
        """Hashes how the story begins and what changes (not who and what it is about)."""
        code = 1 + plot.facing * ("directions" in self.kinds) + 4 * plot.place * ("containers" in self.kinds)
        change = [plot.turn, plot.containers[..., 0] * self.containers + plot.containers[..., 1],
                  plot.people[..., 0] * self.people + plot.people[..., 1]]
        for s in range(self.sentences):
            about = plot.about[:, s]
            what = torch.stack([c[:, s] for c in change], 1).gather(1, about.clamp_min(0)[:, None])[:, 0]
            code = (code * 1_000_003 + torch.where(about < 0, 0, 1 + 1000 * about + what)) % (2 ** 31 - 1)
        return (code * 2654435761 % 2 ** 32 >> 16) % 4 == 0


# ------------------------------------------------------------------------------- private


@dataclass(frozen=True)
class _Plot:
    """What happens in stories, before it is told."""

    persons: Int[Tensor, "example person"]             # by place in NAMES
    things: Int[Tensor, "example thing"]               # by place in ITEMS
    facing: Int[Tensor, "example"]                     # at first
    place: Int[Tensor, "example"]                      # the container that holds the thing, at first
    kind: Int[Tensor, "example sentence"]              # by place in the task's kinds; −1 of a distractor
    about: Int[Tensor, "example sentence"]             # by place in KINDS; −1 of a distractor
    turn: Int[Tensor, "example sentence"]              # by place in TURNS
    containers: Int[Tensor, "example sentence pair"]   # which are swapped
    people: Int[Tensor, "example sentence pair"]       # who swap
    n_people: int

    def only(self, chosen: Bool[Tensor, "example"]) -> _Plot:
        """Some of the stories."""
        kept: dict[str, Any] = {name: value[chosen] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **kept)


@dataclass(frozen=True)
class _Course:
    """States at first and after each sentence."""

    facing: Int[Tensor, "example part"]
    place: Int[Tensor, "example part"]
    owned: Int[Tensor, "example part person"]          # which of the story's things each person has


def _follow(plot: _Plot) -> _Course:
    """What stories come to, sentence by sentence."""
    facing, place = [plot.facing], [plot.place]
    owned = [torch.arange(plot.n_people).expand(len(plot.facing), -1)]
    for s in range(plot.kind.shape[1]):
        about = plot.about[:, s]
        facing.append(torch.where(about == 0, (facing[-1] + plot.turn[:, s] + 1) % 4, facing[-1]))
        a, b = plot.containers[:, s].unbind(-1)
        moved = torch.where(place[-1] == a, b, torch.where(place[-1] == b, a, place[-1]))
        place.append(torch.where(about == 1, moved, place[-1]))
        pair = plot.people[:, s]
        swapped = owned[-1].scatter(1, pair, owned[-1].gather(1, pair.flip(1)))
        owned.append(torch.where((about == 2)[:, None], swapped, owned[-1]))
    return _Course(torch.stack(facing, 1), torch.stack(place, 1), torch.stack(owned, 1))
