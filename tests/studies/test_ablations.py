"""The ablation study: numbers against the model itself, planted loops that settle and that do not, the page."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hooks import HookedLoopMDM, LoopMDMConfig
from studies.ablations import Ablations, find_ablations, main
from studies.questions.ablations.judge import judge
from studies.questions.ablations.measure import MEASURES, attention_change, measure
from studies.questions.ablations.page import page
from studies.results import RESULTS
from studies.zoo import load
from tests.small import uniform_attention
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
    growth = hidden[:, 31].norm(dim=-1) / hidden[:, 7].norm(dim=-1)
    assert numbers["norm_growth"] == pytest.approx(float(growth.quantile(0.5)), rel=1e-3)
    target = hidden[:, -1]
    converged = (torch.cosine_similarity(hidden[:, 29:32], target[:, None], dim=-1) >= 0.99).all(1)
    assert numbers["converged"] == pytest.approx(float(converged.float().mean()), abs=0.01)


def test_loops_that_add_nothing_are_settled(zoo: Path) -> None:
    still, _ = measure(load(zoo / "automaton-loop-ablation-still"), examples=8, seed=0)
    assert (still["converged"], still["cyclic"], still["norm_growth"]) == (1, 0, 1)
    assert still["exact"] == still["exact_more"]
    assert np.isnan([still["step_cosine"], still["attention_change"]]).all(), "nothing moves, not even by rounding"
    moving, _ = measure(load(zoo / "automaton-loop-ablation-base"), examples=8, seed=0)
    assert moving["norm_growth"] != 1
    assert np.isfinite(list(moving.values())).all()


def test_what_has_no_value_is_told_with_its_reason(zoo: Path, tmp_path: Path) -> None:
    assert main(Ablations(examples=6, zoo=zoo, results=tmp_path)) == 0
    text = (tmp_path / "ablations.md").read_text()
    assert "Change of attention from loop to loop (still): not defined because attention is the same in all" in text
    assert "Cosine of successive steps (still): not defined because no state moves" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| still |")]
    assert row.count("not defined") == 2
    assert "nan" not in row


def test_uniform_attention_does_not_change(tmp_path: Path) -> None:
    loaded = load(entry(tmp_path, "base"))
    assert attention_change(loaded.model, TASK.sample(8, seed=0).tokens) > 0
    assert np.isnan(attention_change(uniform_attention(loaded.model), TASK.sample(8, seed=0).tokens))


def test_pages_are_rendered_again_from_what_was_measured(zoo: Path, tmp_path: Path, capsys) -> None:
    """Measures that are no longer told go, words are of today, and no model is run."""
    assert main(Ablations(examples=6, zoo=zoo, results=tmp_path)) == 0
    folder = tmp_path / "ablations-automaton"
    fresh, text = json.loads((folder / "verdict.json").read_text()), (tmp_path / "ablations.md").read_text()
    old = json.loads(json.dumps(fresh))
    for row in old["ablations"]:
        row["values"]["contraction"] = [0.9]
    old["measures"]["contraction"] = {"name": "contraction factor", "definition": "of old"}
    old["words"] = ["The contraction factor is 0.9."]
    (folder / "verdict.json").write_text(json.dumps(old))
    (tmp_path / "ablations.md").write_text("of old")
    assert main(Ablations(zoo=tmp_path / "nothing", results=tmp_path, render=True)) == 0
    assert json.loads((folder / "verdict.json").read_text()) == fresh
    assert (tmp_path / "ablations.md").read_text() == text
    assert "ontraction" not in (folder / "report.html").read_text()

    for row in old["ablations"]:
        del row["values"]["exact"]
    (folder / "verdict.json").write_text(json.dumps(old))
    assert main(Ablations(results=tmp_path, render=True)) == 2
    assert "lacks the measures exact" in capsys.readouterr().err
    assert main(Ablations(results=tmp_path / "nothing", render=True)) == 2
    assert "verdict.json is missing" in capsys.readouterr().err


def test_the_study_writes_a_page_that_names_every_change(zoo: Path, tmp_path: Path, capsys) -> None:
    assert list(find_ablations("automaton", zoo)) == ["base", "injection", "still"]
    assert main(Ablations(examples=6, zoo=zoo, results=tmp_path)) == 0
    text = (tmp_path / "ablations.md").read_text()
    saved = json.loads((tmp_path / "ablations-automaton" / "verdict.json").read_text())
    assert text == page(saved)
    assert {row["change"]: len(row["entries"]) for row in saved["ablations"]} == {"base": 2, "injection": 1, "still": 1}
    assert all(set(row["values"]) == set(MEASURES) for row in saved["ablations"])
    assert "| still |" in text
    assert "http" not in (tmp_path / "ablations-automaton" / "report.html").read_text().split("<body>")[1][:200]


def test_words_tell_what_leaves_the_range_of_the_bases_seeds() -> None:
    told = judge([row("base", 0.4, 0.6), row("injection", 0.9), row("all", 0.5), row("one", 0.1), row("four", None)])
    assert told == ["In the base the share of states whose direction settles is 0.40 to 0.60 over 2 seeds. Higher than "
                    "that by at least 0.05: input injected at each loop (0.90); lower by as much: one looped layer "
                    "(0.10)."]


def row(change: str, *converged: float | None, growth: float | None = None) -> dict:
    return {"change": change, "values": {"converged": list(converged), "exact": [None], "norm_growth": [growth]}}


@pytest.mark.parametrize(("value", "told"), [(0.6 + 4e-16, False), (0.61, False), (0.64, False), (0.65, True),
                                             (0.4 - 4e-16, False), (0.36, False), (0.35, True)])
def test_a_change_within_the_smallest_effect_is_not_told(value: float, told: bool) -> None:
    (sentence,) = judge([row("base", 0.4, 0.6), row("injection", value)])
    assert ("input injected" in sentence) == told


def test_words_tell_whether_states_come_to_rest() -> None:
    assert judge([row("base", None, growth=1.0), row("all", None, growth=4.0)]) == [
        "From loop 8 to loop 32 the norm of the state grows by a factor of 1.0 to 4.0, by 1.1 or more in 1 of 2 "
        "variants; there no state comes to rest, and only its direction can settle."]
    assert "in all 2 variants: no state" in judge([row("base", None, growth=3.0), row("all", None, growth=4.0)])[0]


def test_bundled_pages_speak_of_no_contraction() -> None:
    """Where a state's norm grows linearly, a contraction factor and a last step of 1/128 say nothing."""
    for file in ("ablations.md", "ablations-automaton/verdict.json", "ablations-automaton/report.html"):
        text = (RESULTS / file).read_text()
        assert "contraction" not in text
        assert "relative step at loop" not in text


def test_without_a_base_the_message_says_what_to_train(tmp_path: Path, capsys) -> None:
    assert main(Ablations(zoo=tmp_path, results=tmp_path)) == 2
    assert "--preset ablation-base" in capsys.readouterr().err
