"""Codecs on disk: zoo/codecs/<name>/, with weights in half precision and a card.

    save_codec(codec("ABAB"), "zoo/codecs/ABAB", command="python studies/codecs.py --names ABAB")
    made = load_codec("zoo/codecs/ABAB")
    made.truth, made.accuracy
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hooks.writing import written_whole
from studies.folders import folder
from studies.questions.controls.codec import Codec, CodecConfig, CodecFailed, TrainedCodec, run_accuracy
from studies.questions.controls.operations import OPERATIONS

CODECS = folder("zoo") / "codecs"
"""Where the bundled codecs are."""


def save_codec(made: TrainedCodec, path: str | Path, *, command: str) -> Path:
    """Write a folder with codec.safetensors (half precision), card.json and README.md, whole or not at all.

    Raises `CodecFailed`, before anything is written, if the codec makes more errors with rounded weights, and
    ValueError for one whose letters stand for other operations than the default ones.
    """
    module, path = made.module, Path(path)
    if any(operation is not OPERATIONS.get(letter) for letter, operation in zip(made.truth, module.operations,
                                                                               strict=True)):
        raise ValueError("only letters are stored, not operations: a codec of operations of your own is made anew.")
    state = {name: value.half().contiguous() for name, value in module.state_dict().items()}
    rounded = copy.deepcopy(module)
    rounded.load_state_dict({name: value.float() for name, value in state.items()})
    accuracy = run_accuracy(rounded, module.config.seed + 2)
    if accuracy < made.accuracy:
        raise CodecFailed(f"with weights in half precision the codec gets {accuracy:.4f} of its bits right, not "
                          f"{made.accuracy:.4f}.")
    card = {"name": path.name, "kind": "codec", "truth": made.truth, "command": command, "accuracy": accuracy,
            "steps": made.steps, "parameters": sum(p.numel() for p in module.parameters()),
            "operations": {letter: OPERATIONS[letter].__name__ for letter in sorted(set(made.truth))},
            "config": asdict(module.config), "versions": {"torch": torch.__version__}}
    with written_whole(path) as temporary:
        temporary.mkdir()
        save_file(state, temporary / "codec.safetensors")
        (temporary / "card.json").write_text(json.dumps(card, indent=1) + "\n")
        (temporary / "README.md").write_text(codec_text(card))
    return path


def load_codec(path: str | Path) -> TrainedCodec:
    """A codec from its folder. FileNotFoundError or ValueError name the file and what is wrong."""
    path = Path(path)
    for name in ("card.json", "codec.safetensors"):
        if not (path / name).is_file():
            raise FileNotFoundError(f"{path / name} is missing: a codec's folder holds card.json and "
                                    "codec.safetensors, made by `python studies/codecs.py`.")
    try:
        card = json.loads((path / "card.json").read_text())
        module = Codec(CodecConfig(**card["config"]), OPERATIONS)
        accuracy, steps = float(card["accuracy"]), int(card["steps"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path / 'card.json'} is not a codec's card ({error}).") from error
    try:
        state = load_file(path / "codec.safetensors")
        module.load_state_dict({name: value.float() for name, value in state.items()})
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path / 'codec.safetensors'} does not hold the weights of this codec ({error}).") from error
    return TrainedCodec(module.eval().requires_grad_(False), accuracy, steps)


def bundled_codecs(root: str | Path = CODECS) -> list[str]:
    """Names of the codecs in a folder, in order."""
    return sorted(file.parent.name for file in Path(root).glob("*/card.json"))


def codec_text(card: dict) -> str:
    """The card as Markdown."""
    config = card["config"]
    rows = "\n".join(f"| {letter} | `{name}` |" for letter, name in card["operations"].items())
    what = ("all bits in one vector, an MLP works on them" if config["arrangement"] == "vector" else
            "a bit at each position, attention and MLP work on them")
    return f"""# {card['name']}

A control of known truth for the stage test: one shared block of {config['n_layers']} layer(s), width \
{config['width']}, that runs **{card['truth']}** on {config['bits']} bits ({what}). It has no loop index and sees no \
input after loop 0.{' Its code is turned by a random rotation at every place.' if config['turned'] else ''}

| letter | operation (`studies/questions/controls/operations.py`) |
|---|---|
{rows}

{card['accuracy']:.2%} of the bits are right after the whole sequence, on inputs of another seed, with these weights \
(half precision). {card['parameters']:,} parameters, {card['steps']:,} training steps.

    {card['command']}

    made = load_codec("zoo/codecs/{card['name']}")
    stage_test(made.model(), made.inputs(64, seed=1), targets=made.targets(64, seed=1))
"""
