"""The ablation study: numbers against the model itself, planted loops that settle and that do not, the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hooks import HookedLoopMDM, LoopMDMConfig
from studies.ablations import MEASURES, Ablations, find, main, measure
from studies.ablations_report import page, words
from studies.zoo import load
from tests.small_zoo import TASK


def entry(folder: Path, change: str, seed: int = 0, *, still: bool = False, **model: object) -> Path:
    """A random LoopMDM as the zoo would hold it; ``still``: its looped layers add nothing."""
    config = LoopMDMConfig(vocab_size=3, mask_token_id=2, max_seq_len=TASK.seq_len, d_model=16, n_heads=2, d_mlp=24,
                           max_loops=3, **model)  # type: ignore[arg-type]
    network = HookedLoopMDM(config)
    network.reset_parameters(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        torch.nn.init.normal_(network.unembed_weight, generator=torch.Generator().manual_seed(seed))
        for block in network.blocks[1:3] if still else []:
            for parameter in (block.attn.out.weight, block.mlp.down.weight, block.mlp.down.bias):
                parameter.zero_()
    variant = f"ablation-{change}" + (f"-s{seed}" if seed else "")
    path = folder / f"automaton-loop-{variant}"
    network.save_pretrained(path)
    (path / "card.json").write_text(json.dumps({
        "name": path.name, "kind": "loop", "variant": variant, "task": TASK.to_dict(), "seed": seed, "metrics": {},
        "command": "a test", "parameters": 1,
        "topology": {"head": 1, "loop": 2, "tail": 1, "max_loops": 3}}))
    return path


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zoo")
    for seed in (0, 1):
        entry(folder, "base", seed)
    entry(folder, "injection", input_injection="add")
    entry(folder, "still", still=True)
    return folder


def test_numbers_are_the_models_own(zoo: Path) -> None:
    loaded = load(zoo / "automaton-loop-ablation-base")
    numbers, curves = measure(loaded, examples=10, seed=3)
    batch = TASK.sample(10, seed=3, split="test")
    noised = batch.tokens.masked_fill(batch.free, 2)
    with torch.no_grad():
        for key, s in (("exact", 3), ("exact_more", 6)):
            right = loaded.model(noised, s).argmax(-1) == batch.tokens
            assert numbers[key] == pytest.approx(float((right | ~batch.free).all(1).float().mean()))
        once = (loaded.model(noised, 1).argmax(-1) == batch.tokens)[batch.free].float().mean()
        _, rec = loaded.model.run_with_cache(noised, 128, names_filter="blocks.*.hook_resid_post")
    assert numbers["cells_once"] == pytest.approx(float(once)) == pytest.approx(float(curves.cells.sel(n_loops=1)))
    states = torch.stack([rec.stack(f"blocks.{layer}.hook_resid_post") for layer in (1, 2)])   # [layer, loop, …]
    hidden = states[..., noised == 2, :]
    step = (hidden[:, -1] - hidden[:, -2]).norm(dim=-1) / hidden[:, -2].norm(dim=-1)
    assert numbers["last_step"] == pytest.approx(float(step.quantile(0.5)), rel=1e-3)
    growth = hidden[:, 31].norm(dim=-1) / hidden[:, 7].norm(dim=-1)
    assert numbers["norm_growth"] == pytest.approx(float(growth.quantile(0.5)), rel=1e-3)
    target = hidden[:, -1]
    converged = (torch.cosine_similarity(hidden[:, 29:32], target[:, None], dim=-1) >= 0.99).all(1)
    assert numbers["converged"] == pytest.approx(float(converged.float().mean()), abs=0.01)


def test_loops_that_add_nothing_are_settled(zoo: Path) -> None:
    still, _ = measure(load(zoo / "automaton-loop-ablation-still"), examples=8, seed=0)
    assert (still["converged"], still["cyclic"], still["last_step"], still["norm_growth"]) == (1, 0, 0, 1)
    assert still["exact"] == still["exact_more"]
    moving, _ = measure(load(zoo / "automaton-loop-ablation-base"), examples=8, seed=0)
    assert moving["last_step"] > 0


def test_the_study_writes_a_page_that_names_every_change(zoo: Path, tmp_path: Path, capsys) -> None:
    assert list(find("automaton", zoo)) == ["base", "injection", "still"]
    assert main(Ablations(examples=6, zoo=zoo, results=tmp_path)) == 0
    text = (tmp_path / "ablations.md").read_text()
    saved = json.loads((tmp_path / "ablations-automaton" / "verdict.json").read_text())
    assert text == page(saved)
    assert {row["change"]: len(row["entries"]) for row in saved["ablations"]} == {"base": 2, "injection": 1, "still": 1}
    assert all(set(row["values"]) == set(MEASURES) for row in saved["ablations"])
    assert "| still |" in text
    assert "http" not in (tmp_path / "ablations-automaton" / "report.html").read_text().split("<body>")[1][:200]


def test_words_tell_what_leaves_the_range_of_the_bases_seeds() -> None:
    def row(change: str, *converged: float | None) -> dict:
        return {"change": change, "values": {"converged": list(converged), "exact": [None], "contraction": [None]}}

    told = words([row("base", 0.4, 0.6), row("injection", 0.9), row("all", 0.5), row("one", 0.1), row("four", None)])
    assert told == ["In the base the share of states that converge is 0.40 to 0.60 over 2 seeds; it is higher with "
                    "input injected at each loop (0.90), and lower with one looped layer (0.10)."]


def test_without_a_base_the_message_says_what_to_train(tmp_path: Path, capsys) -> None:
    assert main(Ablations(zoo=tmp_path, results=tmp_path)) == 2
    assert "--preset ablation-base" in capsys.readouterr().err
