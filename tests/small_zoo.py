"""A zoo of small models with random weights, as training would leave it, that the tests of the app share."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hooks import HookedLoopMDM, LoopMDMConfig
from studies.stage_test import StageTest, main
from studies.tasks import Automaton

TASK = Automaton(rule=30, width=6, rows=4)

LAYERS = {"loop": (2, 3), "twin": (2, 1), "deep": (4, 1)}
"""Mid layers and max_loops of each kind."""


def make_zoo(folder: Path) -> Path:
    """A triplet on a small automaton: config, weights, card and curve of each kind, every parameter random."""
    for seed, (kind, (n_mid, max_loops)) in enumerate(LAYERS.items()):
        config = LoopMDMConfig(vocab_size=TASK.vocab_size, mask_token_id=TASK.mask_token_id, max_seq_len=TASK.seq_len,
                               d_model=16, n_heads=2, d_mlp=24, n_loop_layers=n_mid, max_loops=max_loops)
        model = HookedLoopMDM(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
                parameter.add_(spread * torch.randn(parameter.shape, generator=generator))
        path = folder / f"automaton-{kind}"
        model.save_pretrained(path)
        (path / "card.json").write_text(json.dumps({
            "name": path.name, "kind": kind, "task": TASK.to_dict(), "seed": seed, "metrics": {}, "command": "a test",
            "parameters": sum(p.numel() for p in model.parameters()),
            "topology": {"head": 1, "loop": n_mid, "tail": 1, "max_loops": max_loops}}))
        pd.DataFrame({"flops": [1e9, 2e9], "nelbo": [0.7, 0.5 + 0.1 * seed], "train_loss": [0.7, 0.6],
                      "cells@1": [0.5, 0.6], "exact@1": [0.0, 0.1]}).to_parquet(path / "metrics.parquet")
    return folder


def with_curves(zoo: Path) -> Path:
    """The same zoo as one seed, with a curve of training for each entry: the LoopMDM's falls fastest."""
    for card in zoo.glob("*/card.json"):
        values = json.loads(card.read_text())
        card.write_text(json.dumps({**values, "seed": 0, "variant": ""}))
        rate = {"loop": 3.0, "twin": 1.0, "deep": 2.0}[values["kind"]]
        flops = np.linspace(0.1, 1, 10)
        pd.DataFrame({"flops": flops * 1e9, "nelbo": np.exp(-rate * flops)}).to_parquet(card.parent / "metrics.parquet")
    return zoo


def make_results(folder: Path, zoo: Path) -> Path:
    """The stage test of such a zoo, without controls, in ``folder``/results."""
    args = StageTest(groups=("automaton",), per_level=8, t=(1.0,), untrained=1, workers=1, pictures=False, zoo=zoo,
                     runs=folder / "runs", specimens=folder / "none", codecs=folder / "none",
                     results=folder / "results")
    assert main(args) == 0
    return args.results
