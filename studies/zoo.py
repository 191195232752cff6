"""Trained checkpoints and their cards: `zoo/<task>-<kind>[-<variant>]`.

A folder holds config.json and model.safetensors (half precision), card.json with the task,
the run that made it and what it reached, README.md for people, and metrics.parquet, the
curve of training. A triplet is the LoopMDM, twin and deep twin of one task and variant.

    entry = load("zoo/automaton-loop")
    entry.model, entry.task, entry.card["metrics"]
    found = listing("zoo")
    list(found.cards), [str(problem) for problem in found.problems]

One damaged entry does not hide the others: `listing` says which entries are whole and what is wrong with the rest,
and `names` and `load_whole` leave the rest out with a warning that names the file.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hooks import HookedLoopMDM
from hooks.writing import written_whole
from studies.folders import entry_name, folder, group_name
from studies.tasks import Task, load_task
from studies.training.flops import forward_flops
from studies.training.run import TrainConfig, TrainResult

if TYPE_CHECKING:
    import pandas as pd

ZOO = folder("zoo")
KINDS = {"loop": "LoopMDM", "twin": "unlooped twin (equal parameters)",
         "deep": "unlooped deep twin (equal per-step compute)"}
SHORT_NAMES = {"loop": "LoopMDM", "twin": "unlooped twin", "deep": "deep twin"}
"""What figures and tables call the kinds."""


@dataclass(frozen=True)
class Entry:
    """One checkpoint, loaded."""

    path: Path
    card: dict[str, Any]
    task: Task
    model: HookedLoopMDM

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def kind(self) -> str:
        return str(self.card["kind"])


@dataclass(frozen=True)
class Problem:
    """A file that cannot be used, and why; as text, one line."""

    file: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


@dataclass(frozen=True)
class Listing:
    """What a zoo holds: the cards of whole entries by name, and what is wrong with the others."""

    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


REQUIRED: dict[str, type | tuple[type, ...]] = {"task": dict, "kind": str, "seed": int, "metrics": dict,
                                                "command": str, "parameters": int, "topology": dict}
"""What a card must have, and of which type."""
LAYERS = ("head", "loop", "tail", "max_loops")
"""What a card's topology must have, all of them whole numbers."""
REMEDY = "restore it, or make the entry again with `python studies/pretrain.py`."


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds a JSON object. ValueError if it does not; the message leaves the file's name to the caller."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise ValueError(f"it is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"it holds a JSON {type(values).__name__}, not an object")
    return values


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of one folder. FileNotFoundError or ValueError name the file and what is wrong."""
    file = Path(path) / "card.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: {path} is not a zoo entry. "
                                "Entries are made by `python studies/pretrain.py`.")
    try:
        return _checked(read_json(file))
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {REMEDY}") from error


def _checked(card: dict[str, Any]) -> dict[str, Any]:
    """A card with all that its readers rely on. ValueError says what is missing or unknown."""
    if missing := sorted(set(REQUIRED) - set(card)):
        raise ValueError(f"it lacks {', '.join(missing)}")
    for key, kind in REQUIRED.items():
        if not isinstance(card[key], kind) or isinstance(card[key], bool):
            raise ValueError(f"its {key} is {card[key]!r}, which is of the wrong type")
    if card["kind"] not in KINDS:
        raise ValueError(f"its kind {card['kind']!r} is unknown; there are {', '.join(KINDS)}")
    if bad := [key for key in LAYERS if not isinstance(card["topology"].get(key), int)]:
        raise ValueError(f"its topology lacks {', '.join(bad)}")
    try:
        load_task(card["task"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"its task cannot be made ({error})") from error
    return card


def listing(zoo: str | Path = ZOO) -> Listing:
    """The entries of a zoo by name: cards of the whole ones, problems of the others. Reads no weights."""
    cards: dict[str, dict[str, Any]] = {}
    problems: list[Problem] = []
    for file in sorted(Path(zoo).glob("*/card.json")):
        try:
            cards[file.parent.name] = read_card(file.parent)
        except (FileNotFoundError, ValueError) as error:
            problems.append(Problem(file, str(error).removeprefix(f"{file}: ")))
    return Listing(cards, tuple(problems))


def read_metrics(path: str | Path) -> pd.DataFrame:
    """The curve of training of one folder. FileNotFoundError or ValueError name the file and what is wrong."""
    import pandas as pd

    file = Path(path) / "metrics.parquet"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: {REMEDY}")
    try:
        table = pd.read_parquet(file)
    except Exception as error:   # pyarrow raises its own kinds, OSError and struct errors alike
        raise ValueError(f"{file}: it is not a Parquet file ({error}); {REMEDY}") from error
    try:
        return curve_of(table)
    except ValueError as error:
        raise ValueError(f"{file}: {error}; {REMEDY}") from error


def curve_of(table: pd.DataFrame) -> pd.DataFrame:
    """A table of evaluations that has what every curve is drawn from. ValueError says what it lacks."""
    from pandas.api.types import is_numeric_dtype

    if missing := sorted({"flops", "nelbo"} - set(table.columns)):
        raise ValueError(f"it has no column {' and '.join(missing)}")
    if bad := [str(name) for name in table.columns if not is_numeric_dtype(table[name])]:
        raise ValueError(f"its column {' and '.join(bad)} does not hold numbers")
    if table.empty:
        raise ValueError("it holds no evaluation")
    return table


def load(path: str | Path, *, device: str = "cpu") -> Entry:
    """A zoo entry: model in evaluation mode, task and card. FileNotFoundError or ValueError name what is wrong."""
    path = Path(path)
    card = read_card(path)
    task = load_task(card["task"])
    if (path / "config.json").exists():
        try:
            read_json(path / "config.json")
        except ValueError as error:
            raise ValueError(f"{path / 'config.json'}: {error}; {REMEDY}") from error
    model = HookedLoopMDM.from_pretrained(str(path), map_location=device)
    if model.config.vocab_size != task.vocab_size or model.config.max_seq_len < task.seq_len:
        raise ValueError(f"{path}: the model takes {model.config.vocab_size} tokens and {model.config.max_seq_len} "
                         f"positions, the task in card.json needs {task.vocab_size} and {task.seq_len}.")
    return Entry(path, card, task, model)


def names(zoo: str | Path = ZOO) -> list[str]:
    """The whole entries of a zoo, by name; the others are left out with a warning each."""
    found = listing(zoo)
    for problem in found.problems:
        skipped(problem)
    return list(found.cards)


def skipped(problem: Problem | Exception) -> None:
    """Warn that an entry is left out."""
    warnings.warn(f"left out, {problem}", UserWarning, stacklevel=3)


def load_whole(paths: Iterable[Path], *, check: Callable[[Path], Any] | None = None) -> dict[str, Entry]:
    """Entries by name; those that cannot be loaded, or of which ``check`` raises, are left out with a warning each."""
    found = {}
    for path in paths:
        try:
            if check is not None:
                check(path)
            found[path.name] = load(path)
        except (FileNotFoundError, ValueError) as error:
            skipped(error)
    return found


def triplet(task: str = "automaton", variant: str = "", zoo: str | Path = ZOO) -> dict[str, Entry]:
    """The entries of one task and variant by kind; those that exist and are whole."""
    folders = {kind: Path(zoo) / entry_name(task, kind, variant) for kind in KINDS}
    whole = load_whole(folder for folder in folders.values() if (folder / "card.json").exists())
    return {kind: whole[folder.name] for kind, folder in folders.items() if folder.name in whole}


def find_groups(zoo: str | Path = ZOO, *,
                check: Callable[[Path], Any] | None = None) -> dict[str, dict[int, dict[str, Entry]]]:
    """group → seed → kind → entry; seeds of which there are a LoopMDM and a twin.

    Entries that are damaged, or whose folder makes ``check`` raise, are left out with a warning each.
    """
    found: dict[str, dict[int, dict[str, Entry]]] = defaultdict(lambda: defaultdict(dict))
    for entry in load_whole((Path(zoo) / name for name in names(zoo)), check=check).values():
        group = group_name(entry.task.name, str(entry.card.get("variant", "")))
        found[group][int(entry.card["seed"])][entry.kind] = entry
    whole = {group: {seed: kinds for seed, kinds in sorted(seeds.items()) if {"loop", "twin"} <= set(kinds)}
             for group, seeds in found.items()}
    return {group: seeds for group, seeds in sorted(whole.items()) if seeds}


def variants_of(task: str, zoo: str | Path = ZOO) -> list[str]:
    """Variants of which the whole triplet is there, the first seed ("") first."""
    stem, there = entry_name(task, "loop"), set(names(zoo))
    found = {name.removeprefix(stem).removeprefix("-") for name in there if name.startswith(stem)}
    return sorted(v for v in found if {entry_name(task, kind, v) for kind in KINDS} <= there)


def export(config: TrainConfig, result: TrainResult, *, variant: str = "", zoo: str | Path = ZOO,
           command: str) -> Path:
    """Write the entry of a finished run; the folder appears whole or not at all."""
    import pandas as pd

    name = entry_name(config.task.name, config.kind, variant)
    card = make_card(config, result, name=name, variant=variant, command=command)
    with written_whole(Path(zoo) / name) as temporary:
        temporary.mkdir()
        copy.deepcopy(result.model).half().cpu().save_pretrained(temporary)
        (temporary / "card.json").write_text(json.dumps(card, indent=1) + "\n")
        (temporary / "README.md").write_text(card_text(card))
        pd.DataFrame(result.metrics).to_parquet(temporary / "metrics.parquet", index=False)
    return Path(zoo) / name


def make_card(config: TrainConfig, result: TrainResult, *, name: str, variant: str, command: str) -> dict[str, Any]:
    """Everything a reader needs to judge a checkpoint and make it again."""
    model = result.model.config
    mean_s = (model.max_loops + 1) / 2
    return {
        "name": name, "kind": config.kind, "variant": variant, "task": config.task.to_dict(), "seed": config.seed,
        "command": command,
        "data": f"generated by studies/tasks/{config.task.name}.py; step n of seed s draws its examples from (s, n); "
                "tests use a disjoint split",
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "topology": {"head": model.n_head_layers, "loop": model.n_loop_layers, "tail": model.n_tail_layers,
                     "max_loops": model.max_loops},
        "training": {"steps": result.step, "examples": result.step * config.batch_size, "tokens": result.tokens,
                     "flops": result.flops, "budget_flops": config.budget_flops, "finished": result.finished,
                     "seconds": round(result.seconds), "batch_size": config.batch_size, "lr": config.peak_lr,
                     "warmup_steps": config.warmup_steps, "weight_decay": config.weight_decay,
                     "ema_decay": config.ema_decay, "loss_on": config.loss_on, "loops_drawn": config.loops_drawn,
                     "curriculum": config.curriculum, "masks": config.masks, "noise_levels": config.noise_levels,
                     "decay_share": config.decay_share, "schedule": config.schedule, "precision": config.precision,
                     "compile": config.compile, "device": config.device, "threads": torch.get_num_threads()},
        "forward_flops": {"per_example_at_mean_loops": forward_flops(model, seq_len=config.task.seq_len,
                                                                     n_loops=mean_s)},
        "metrics": result.metrics[-1] if result.metrics else {},
        "weights": "exponential moving average, stored in half precision",
        "versions": {"torch": torch.__version__},
    }


def card_text(card: dict[str, Any]) -> str:
    """The card as Markdown, with the front matter that a model hub reads."""
    top, run = card["topology"], card["training"]
    drawn = {"growth": f"S ~ U{{1..1}} to U{{1..{top['max_loops']}}} over the first half of the training",
             "equal_flops": f"S from 1..{top['max_loops']}, each with equal FLOPs"}
    loops = drawn.get(run["loops_drawn"], f"S ~ U{{1..{top['max_loops']}}}") if top["max_loops"] > 1 else "run once"
    rows = "\n".join(f"| {key} | {value:.4g} |" for key, value in card["metrics"].items())
    return f"""---
library_name: loopscope
tags: [looped-transformer, masked-diffusion, {card['task']['name']}]
---
# {card['name']}

{KINDS[card['kind']]} on *{card['task']['name']}* {_arguments(card['task'])}.
{card['parameters']:,} parameters: {top['head']} head + {top['loop']} mid ({loops}) + {top['tail']} tail layers.

Trained for {run['steps']:,} steps of {run['batch_size']} examples, {run['flops']:.3g} FLOPs, \
{run['seconds'] / 60:.0f} minutes on {run['device']}, seed {card['seed']}{'' if run['finished'] else ' (unfinished)'}.
Data: {card['data']}.

    {card['command']}

| metric | value |
|---|---|
{rows}

`cells@S` and `exact@S`: share of free cells right, and of whole examples right, with every free position
masked and filled in one forward of S loops, on held-out examples. `nelbo@S`: nats per free token after S loops;
`cells_<region>@S`: the share of one region's free cells, such as the third hop's or the second row's.
`nelbo_line@S`: after S loops that only repeat the second one's step; `loops_idle`: 1 if loops gain nearly nothing
over one loop, or over such a line.
"""


def _arguments(task: dict[str, Any]) -> str:
    values = ", ".join(f"{key} {value}" for key, value in task.items() if key != "name")
    return f"({values})" if values else ""
