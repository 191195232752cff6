"""Trained checkpoints and their cards: `zoo/<task>-<kind>[-<variant>]`.

A folder holds config.json and model.safetensors (half precision), card.json with the task,
the run that made it and what it reached, README.md for people, and metrics.parquet, the
curve of training. A triplet is the LoopMDM, twin and deep twin of one task and variant.

    entry = load("zoo/automaton-loop")
    entry.model, entry.task, entry.card["metrics"]
    for entry in entries("zoo"): print(entry.name)
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hooks import HookedLoopMDM
from studies.flops import forward_flops
from studies.folders import folder
from studies.tasks import Task, load_task
from studies.training import TrainConfig, TrainResult

ZOO = folder("zoo")
KINDS = {"loop": "LoopMDM", "twin": "unlooped twin (equal parameters)",
         "deep": "unlooped deep twin (equal per-step compute)"}


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


def read_card(path: str | Path) -> dict[str, Any]:
    """The card of one folder. FileNotFoundError or ValueError name the file and what is wrong."""
    file = Path(path) / "card.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: {path} is not a zoo entry. "
                                "Entries are made by `python studies/pretrain.py`.")
    try:
        card = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}): restore it, or make the entry again.") from error
    if missing := {"task", "kind", "seed", "metrics", "command"} - set(card):
        raise ValueError(f"{file} lacks {sorted(missing)}: it was not written by studies/pretrain.py.")
    return dict(card)


def load(path: str | Path, *, device: str = "cpu") -> Entry:
    """A zoo entry: model in evaluation mode, task and card."""
    path = Path(path)
    card = read_card(path)
    task = load_task(card["task"])
    model = HookedLoopMDM.from_pretrained(str(path), map_location=device)
    if model.config.vocab_size != task.vocab_size or model.config.max_seq_len < task.seq_len:
        raise ValueError(f"{path}: the model takes {model.config.vocab_size} tokens and {model.config.max_seq_len} "
                         f"positions, the task in card.json needs {task.vocab_size} and {task.seq_len}.")
    return Entry(path, card, task, model)


def names(zoo: str | Path = ZOO) -> list[str]:
    """The folders of a zoo, by name."""
    return sorted(p.parent.name for p in Path(zoo).glob("*/card.json"))


def triplet(task: str = "automaton", variant: str = "", zoo: str | Path = ZOO) -> dict[str, Entry]:
    """The entries of one task and variant by kind; those that exist."""
    folders = {kind: Path(zoo) / "-".join(filter(None, (task, kind, variant))) for kind in KINDS}
    return {kind: load(folder) for kind, folder in folders.items() if (folder / "card.json").exists()}


def variants_of(task: str, zoo: str | Path = ZOO) -> list[str]:
    """Variants of which the whole triplet is there, the first seed ("") first."""
    stem = f"{task}-loop"
    found = {name.removeprefix(stem).removeprefix("-") for name in names(zoo) if name.startswith(stem)}
    return sorted(v for v in found if all((Path(zoo) / "-".join(filter(None, (task, kind, v))) / "card.json").exists()
                                          for kind in KINDS))


def export(config: TrainConfig, result: TrainResult, *, variant: str = "", zoo: str | Path = ZOO,
           command: str) -> Path:
    """Write the entry of a finished run; the folder appears whole or not at all."""
    import pandas as pd

    name = "-".join(filter(None, (config.task.name, config.kind, variant)))
    final, temporary = Path(zoo) / name, Path(zoo) / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    card = make_card(config, result, name=name, variant=variant, command=command)
    copy.deepcopy(result.model).half().cpu().save_pretrained(temporary)
    (temporary / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    (temporary / "README.md").write_text(card_text(card))
    pd.DataFrame(result.metrics).to_parquet(temporary / "metrics.parquet", index=False)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    return final


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
                     "seconds": round(result.seconds), "batch_size": config.batch_size, "lr": config.lr,
                     "warmup_steps": config.warmup_steps, "weight_decay": config.weight_decay,
                     "ema_decay": config.ema_decay, "loss_on": config.loss_on, "loops_drawn": config.loops_drawn,
                     "schedule": config.schedule, "precision": config.precision, "compile": config.compile,
                     "device": config.device, "threads": torch.get_num_threads()},
        "forward_flops": {"per_example_at_mean_loops": forward_flops(model, seq_len=config.task.seq_len,
                                                                     n_loops=mean_s)},
        "metrics": result.metrics[-1] if result.metrics else {},
        "weights": "exponential moving average, stored in half precision",
        "versions": {"torch": torch.__version__},
    }


def card_text(card: dict[str, Any]) -> str:
    """The card as Markdown, with the front matter that a model hub reads."""
    top, run = card["topology"], card["training"]
    loops = f"S ~ U{{1..{top['max_loops']}}}" if top["max_loops"] > 1 else "run once"
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
masked and filled in one forward of S loops, on held-out examples. `nelbo`: nats per free token.
"""


def _arguments(task: dict[str, Any]) -> str:
    values = ", ".join(f"{key} {value}" for key, value in task.items() if key != "name")
    return f"({values})" if values else ""
