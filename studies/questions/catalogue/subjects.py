"""Models that the catalogue can be made on: of the zoo, of other makers, or one's own.

    [found] = measurable(["automaton-loop"])                  # also "zoo/automaton-loop", "ALBERT", a folder, a hub id
    setting = found.setting(examples=16, t=0.9, n_loops=4, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooks import HookedLoopMDM
from hooks.model.diffusion import corrupt
from studies.questions.catalogue.entries.setting import Setting
from studies.questions.stage_test.others import other_subjects
from studies.questions.stage_test.subjects import Subject, task_examples
from studies.results import file_hash
from studies.zoo import ZOO, load, names


@dataclass(frozen=True)
class Measurable:
    """A model and where its examples come from; loaded when it is measured."""

    name: str
    about: str
    make: Callable[[int, float, int, int], Setting]
    identity: str                               # changes with the weights, and with one's own inputs

    def setting(self, examples: int, t: float, n_loops: int, seed: int) -> Setting:
        """The model on so many held-out examples."""
        return self.make(examples, t, n_loops, seed)


def measurable(models: Sequence[str], *, tokens: Path | None = None, zoo: Path = ZOO,
               specimens: Path = Path("runs/specimens")) -> list[Measurable]:
    """Models by name. FileNotFoundError or ValueError, with a remedy, for one that is not there.

    ``tokens`` is a .npy file with clean tokens [example, pos], for LoopMDMs that come without a task.
    """
    known = set(names(zoo))
    others, missing = other_subjects(specimens)
    by_name = {subject.name: subject for subject in others}
    found = []
    for model in models:
        short = Path(model).name
        if short in known and (model == short or (zoo / short).resolve() == Path(model).resolve()):
            found.append(_of_zoo(short, zoo, known))
        elif model in by_name:
            found.append(_foreign(by_name[model]))
        elif model in missing:
            raise FileNotFoundError(f"{model} is not here: {missing[model]}.")
        elif tokens is not None:
            found.append(_own(model, tokens))
        else:
            raise ValueError(f"{model} is not in {zoo}, and not one of {', '.join([*by_name, *missing])}. Of a LoopMDM "
                             "of your own (a folder or a hub id), give clean tokens too: --tokens FILE.npy, "
                             "[example, pos].")
    return found


def _of_zoo(name: str, zoo: Path, known: set[str]) -> Measurable:
    entry = load(zoo / name)
    twin = name.replace("-loop", "-twin", 1)
    has_twin = entry.card["kind"] == "loop" and twin in known
    about = {"loop": "LoopMDM", "twin": "twin (as many parameters, not looped)",
             "deep": "deep twin (as much compute, not looped)"}[entry.card["kind"]]
    return Measurable(name, f"{about}, task {entry.card['task']['name']}",
                      partial(_zoo_setting, zoo / name, zoo / twin if has_twin else None),
                      file_hash(zoo / name / "model.safetensors")[:12])


def _zoo_setting(path: Path, twin: Path | None, examples: int, t: float, n_loops: int, seed: int) -> Setting:
    entry = load(path)
    drawn = task_examples(entry.task, examples, seed, (t,))
    return Setting(entry.model, drawn.inputs, drawn.targets, drawn.scored, n_loops if entry.model.max_loops > 1 else 1,
                   drawn.t, None if twin is None else load(twin).model, seed)


def _foreign(subject: Subject) -> Measurable:
    return Measurable(subject.name, subject.about, partial(_foreign_setting, subject), subject.identity)


def _foreign_setting(subject: Subject, examples: int, t: float, n_loops: int, seed: int) -> Setting:
    [model] = subject.load()
    drawn = subject.examples(examples, seed, (t,))
    return Setting(model, drawn.inputs, drawn.targets, drawn.scored, subject.n_loops, drawn.t, None, seed)


def _own(model: str, tokens: Path) -> Measurable:
    clean = _clean_tokens(tokens)
    loaded = HookedLoopMDM.from_pretrained(model)
    if clean.shape[1] > loaded.config.max_seq_len or int(clean.max()) >= loaded.config.vocab_size:
        raise ValueError(f"{tokens} holds {clean.shape[1]} positions and tokens up to {int(clean.max())}; {model} "
                         f"takes {loaded.config.max_seq_len} positions and tokens below {loaded.config.vocab_size}.")
    return Measurable(Path(model).name, f"LoopMDM from {model}", partial(_own_setting, model, tokens),
                      f"{model} {file_hash(tokens)[:12]}")


def _own_setting(model: str, tokens: Path, examples: int, t: float, n_loops: int, seed: int) -> Setting:
    loaded = HookedLoopMDM.from_pretrained(model)
    clean = _clean_tokens(tokens)[:examples]
    levels = torch.full((len(clean),), t)
    noised = corrupt(clean, levels, loaded.config.mask_token_id, generator=torch.Generator().manual_seed(seed))
    return Setting(loaded, noised, clean, noised == loaded.config.mask_token_id,
                   n_loops if loaded.config.max_loops > 1 else 1, levels, None, seed)


def _clean_tokens(file: Path) -> Int[Tensor, "example pos"]:
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: save clean tokens with numpy.save, [example, pos].")
    clean = np.load(file, allow_pickle=False)
    if clean.ndim != 2 or not np.issubdtype(clean.dtype, np.integer) or clean.min(initial=0) < 0:
        raise ValueError(f"{file} must hold whole numbers of at least 0, [example, pos], not {clean.dtype} of shape "
                         f"{clean.shape}.")
    return torch.from_numpy(clean.astype(np.int64))
