"""What the stage test is asked about: models of the zoo by group and kind, and looped models of other makers.

    for subject in zoo_subjects("zoo"):
        subject.name, subject.kind, len(subject.seeds)        # "automaton", "loop", 6

A group's models of all training seeds are one subject, so that its intervals tell seeds and examples apart. A deep twin
is cut into pseudo-loops of as many layers as the LoopMDM loops: what no shared weight forces to repeat.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooks import HookedLoopMDM, LoopedModel, adopt
from hooks.model.diffusion import corrupt
from studies.folders import group_name, without_seed
from studies.questions.controls.codec_files import load_codec
from studies.results import file_hash
from studies.tasks import Task, load_task
from studies.zoo import load_whole, names, read_card

SubjectKind = Literal["control", "loop", "deep", "foreign", "untrained"]

CODECS = ("AAAA", "ABCD")
"""Controls that are shown beside the zoo: blocks built to run these programmes (`studies.questions.controls`)."""
UNTRAINED_LOOPS = 4

LEVELS = (0.9, 1.0, 0.5)
"""Noise levels that are judged apart by default, the main one first. Where few positions are masked, later loops have
little to do; where all are, a position's mean state also tells how far the answer has come."""


@dataclass(frozen=True)
class Examples:
    """Inputs with noise levels, and what should be answered."""

    inputs: Int[Tensor, "example pos"] | Float[Tensor, "example pos d_model"]
    targets: Int[Tensor, "example answer"]
    scored: Bool[Tensor, "example answer"]
    t: Float[Tensor, "example"] | None


@dataclass(frozen=True)
class Subject:
    """Models of one kind that are tested together, and how."""

    name: str                                   # group, or architecture
    kind: SubjectKind
    about: str                                  # in words
    load: Callable[[], list[LoopedModel]]
    examples: Callable[[int, int, Sequence[float]], Examples]    # (per level, seed, levels) →
    seeds: tuple[int, ...] = (0,)               # training seeds of the models
    n_loops: int | None = None                  # in one forward; None: as many as the answer needs
    layers_per_loop: int | None = None          # pseudo-loops of an unlooped model
    far: tuple[int, int] | None = None          # a range of loops beyond training, judged beside
    whole: bool = True                          # at every noise level, or at the first alone
    identity: str = ""                          # changes with the weights
    entries: tuple[str, ...] = field(default=())

    @property
    def key(self) -> str:
        return f"{self.name}-{self.kind}"


def task_examples(task: Task, per_level: int, seed: int, levels: Sequence[float] = LEVELS) -> Examples:
    """Held-out examples of a task, ``per_level`` of them at each noise level."""
    batch = task.sample(per_level * len(levels), seed=seed, split="test")
    t = torch.tensor(levels, dtype=torch.float32).repeat_interleave(per_level)
    generator = torch.Generator().manual_seed(seed)
    noised = corrupt(batch.tokens, t, task.mask_token_id, free=batch.free, generator=generator)
    return Examples(noised, batch.tokens, noised == task.mask_token_id, t)


def zoo_subjects(zoo: str | Path) -> list[Subject]:
    """Every looped model of the zoo, grouped over seeds, and the deep twins of those that have some."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    cards = {name: read_card(Path(zoo) / name) for name in names(zoo)}
    for name, card in cards.items():
        if card["kind"] in ("loop", "deep"):
            group = group_name(str(card["task"]["name"]), str(card.get("variant", "")))
            groups[group, str(card["kind"])].append(name)
    found = []
    for (group, kind), entries in sorted(groups.items()):
        ordered = sorted(entries, key=lambda name: int(cards[name]["seed"]))
        if kind == "loop":
            found.append(_looped(group, ordered, cards, zoo))
        elif (group, "loop") in groups:
            looped = cards[groups[group, "loop"][0]]["topology"]
            if cards[ordered[0]]["topology"]["loop"] >= 2 * looped["loop"]:
                found.append(_deep(group, ordered, cards, zoo, int(looped["loop"])))
    return found


def chosen_subjects(found: Sequence[Subject], zoo: str | Path, groups: Sequence[str]) -> list[Subject]:
    """Those of some groups, by default all. ValueError, with a remedy, for groups that are not there, or if there is
    nothing."""
    names = list(dict.fromkeys(subject.name for subject in found))
    if unknown := sorted(set(groups) - set(names)):
        raise ValueError(f"no looped model of {', '.join(unknown)} is in {zoo}; there are "
                         f"{', '.join(names) or 'none'}. Train one with `python studies/pretrain.py`.")
    if not found:
        raise ValueError(f"no looped model is in {zoo}: train one with `python studies/pretrain.py`.")
    return [subject for subject in found if not groups or subject.name in groups]


def trained_subjects(zoo: str | Path, groups: Sequence[str] = ()) -> list[Subject]:
    """The LoopMDMs of each task, or of some groups, without ablations. ValueError for groups that are not there."""
    return chosen_subjects([subject for subject in zoo_subjects(zoo) if subject.kind == "loop" and subject.whole], zoo,
                           groups)


def codec_subjects(folder: str | Path) -> list[Subject]:
    """Blocks whose programme is known, from the zoo of codecs; those that are not there are left out."""
    return [Subject(name, "control", f"looped block built to run {name}", partial(_codec, Path(folder) / name),
                    partial(_codec_examples, Path(folder) / name), n_loops=len(name),
                    identity=file_hash(Path(folder) / name / "codec.safetensors")[:12])
            for name in CODECS if (Path(folder) / name / "codec.safetensors").is_file()]


def _codec(folder: Path) -> list[LoopedModel]:
    module = load_codec(folder).module
    return [adopt(module, layers=[f"layers.{i}" for i in range(len(module.layers))], n_loops=len(module.operations),
                  readout=module.readout)]


def _codec_examples(folder: Path, per_level: int, seed: int, levels: Sequence[float]) -> Examples:
    codec, n = load_codec(folder), max(64, per_level * len(levels))   # an example is a single position
    targets = codec.targets(n, seed=seed)
    return Examples(codec.inputs(n, seed=seed), targets, torch.ones_like(targets, dtype=torch.bool), None)


def _looped(group: str, entries: list[str], cards: Mapping[str, dict[str, Any]], zoo: str | Path) -> Subject:
    top = cards[entries[0]]["topology"]
    s_max = int(top["max_loops"])
    seeds = tuple(int(cards[name]["seed"]) for name in entries)
    layers = f"{top['loop']} looped layer{'s' * (top['loop'] != 1)}"
    whole = not str(cards[entries[0]].get("variant", "")).startswith("ablation")   # those are large, and many
    return Subject(group, "loop", f"LoopMDM, {layers}, S_max = {s_max}", partial(_loaded, tuple(entries), Path(zoo)),
                   partial(_drawn, cards[entries[0]]["task"]), seeds, None, None,
                   (2 * s_max, 2 * s_max + 2) if whole else None, whole, _identity(entries, zoo), tuple(entries))


def _deep(group: str, entries: list[str], cards: Mapping[str, dict[str, Any]], zoo: str | Path, layers: int) -> Subject:
    seeds = tuple(int(cards[name]["seed"]) for name in entries)
    return Subject(group, "deep", f"unlooped deep twin, cut into pseudo-loops of {layers} "
                                  f"layer{'s' * (layers != 1)}",
                   partial(_loaded, tuple(entries), Path(zoo)), partial(_drawn, cards[entries[0]]["task"]), seeds, None,
                   layers, None, False, _identity(entries, zoo), tuple(entries))   # a fitted basis takes long


def _loaded(entries: tuple[str, ...], zoo: Path) -> list[LoopedModel]:
    return [entry.model for entry in load_whole(zoo / name for name in entries).values()]


def _drawn(task: dict[str, Any], per_level: int, seed: int, levels: Sequence[float]) -> Examples:
    return task_examples(load_task(task), per_level, seed, levels)


def _identity(entries: list[str], zoo: str | Path) -> str:
    return " ".join(file_hash(Path(zoo) / name / "model.safetensors")[:12] for name in entries)


def untrained_subjects(zoo: str | Path, *, n: int, groups: Sequence[str] = ()) -> list[Subject]:
    """``n`` untrained initialisations of the shape of each task's looped model (of some), tested one by one."""
    cards = {name: read_card(Path(zoo) / name) for name in names(zoo)}
    found = []
    for name, card in cards.items():
        if card["kind"] != "loop" or card["seed"] != 0 or without_seed(str(card.get("variant", ""))):
            continue
        if groups and card["task"]["name"] not in groups:
            continue
        for seed in range(n):
            found.append(Subject(f"{group_name(card['task']['name'], '')}, initialisation {seed}", "untrained",
                                 f"LoopMDM of the shape of {name}, not trained",
                                 partial(_untrained, Path(zoo) / name, seed), partial(_drawn, card["task"]), (seed,),
                                 UNTRAINED_LOOPS, identity=f"{name} {seed}"))
    return found


def _untrained(folder: Path, seed: int) -> list[LoopedModel]:
    return [untrained_model(folder, seed)]


def untrained_model(folder: Path, seed: int) -> HookedLoopMDM:
    """A new model of the shape of a checkpoint."""
    config = HookedLoopMDM.from_pretrained(str(folder)).config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return HookedLoopMDM(config).eval()
