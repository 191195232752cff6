"""The explorer's pages through Streamlit's own test runner, on a zoo of small random models."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from streamlit.testing.v1 import AppTest

from app import compute, data, selection
from studies.zoo import load
from tests.small_zoo import TASK, make_results, make_zoo

ROOT = Path(__file__).resolve().parents[2]
LIVE = ("lens", "dynamics", "attention", "probes", "denoise")

pytestmark = [
    # AppTest leaves its folder of scripts to the garbage collector
    pytest.mark.filterwarnings("ignore:Implicitly cleaning up <TemporaryDirectory:ResourceWarning"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(zoo, results): a triplet of small random models, and the study of it."""
    folder = tmp_path_factory.mktemp("explorer")
    zoo = make_zoo(folder / "zoo")
    return zoo, make_results(folder, zoo)


@pytest.fixture
def app(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> AppTest:
    monkeypatch.setenv("LOOPSCOPE_ZOO", str(folders[0]))
    monkeypatch.setenv("LOOPSCOPE_RESULTS", str(folders[1]))
    return AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=600)


def opened(app: AppTest, page: str, **query: str) -> AppTest:
    """The app at a page, as if its address had been opened with these query parameters."""
    for name, value in query.items():
        app.query_params[name] = value
    healthy(app.run())
    return healthy(app.switch_page(f"views/{page}.py").run()) if page != "verdict" else app


def healthy(app: AppTest) -> AppTest:
    assert not app.exception, [error.value for error in app.exception]
    assert not app.error, [error.value for error in app.error]
    return app


def figures(app: AppTest) -> dict[str, dict[str, Any]]:
    """Every plotly figure on the page by its key."""
    return {chart.key: json.loads(chart.proto.spec) for chart in app.get("plotly_chart")}


def labelled(figure: dict[str, Any]) -> bool:
    """Do both axes say what they are, by a title or by names for ticks, and is there a legend or a colour bar?"""
    layout = figure["layout"]
    axes = {key: axis for key, axis in layout.items() if key.startswith(("xaxis", "yaxis"))}
    named = all(any(axis.get("title", {}).get("text") or isinstance((axis.get("ticktext") or [0])[0], str)
                    for key, axis in axes.items() if key.startswith(side)) for side in ("xaxis", "yaxis"))
    strips = any(note.get("text") for note in layout.get("annotations", []))
    keyed = layout.get("showlegend") or "colorbar" in layout.get("coloraxis", {}) or any(
        "colorbar" in trace for trace in figure["data"])
    return (named or strips) and bool(keyed)


@pytest.mark.parametrize("page", ["verdict", *LIVE])
def test_every_page_draws_labelled_figures_with_an_explanation_and_downloads(app: AppTest, page: str) -> None:
    opened(app, page)
    drawn = figures(app)
    assert len(drawn) >= 2
    assert all(labelled(figure) for figure in drawn.values()), [k for k, f in drawn.items() if not labelled(f)]
    explanations = [c.value for c in app.caption if c.value.startswith(":material/visibility:")]
    charts = [key for key in drawn if key.startswith("chart-")]
    assert len(explanations) == len(charts)
    buttons = {button.key for button in app.get("download_button")}
    assert {f"{kind}-{key.removeprefix('chart-')}" for key in charts for kind in ("csv", "html")} <= buttons


@pytest.mark.parametrize("page", LIVE)
def test_figures_follow_model_loops_and_mask(app: AppTest, page: str) -> None:
    opened(app, page)
    seen = [figures(app)]
    for change in (lambda: app.slider(key="loops").set_value(5),
                   lambda: app.selectbox(key="model").select("automaton-deep"),
                   lambda: app.slider(key="t").set_value(0.5),
                   lambda: app.number_input(key="example").set_value(3)):
        change()
        healthy(app.run())
        now = figures(app)
        if page == "probes" and len(seen) == 4:   # probes look at many examples, not at the one chosen
            assert now == seen[-1]
        else:
            assert now != seen[-1]
        seen.append(now)


@pytest.mark.parametrize("page", LIVE)
@pytest.mark.parametrize(("loops", "mask"), [("1", "000000"), ("2", "03ffff"), ("24", "000001")])
def test_extremes_of_loops_and_masks_are_shown_or_explained(app: AppTest, page: str, loops: str, mask: str) -> None:
    opened(app, page, loops=loops, masking="by hand", mask=mask)
    n = sum(bin(int(digit, 16)).count("1") for digit in mask)
    assert f"{n} of 18 free positions masked" in [caption.value for caption in app.caption]
    assert figures(app) or app.info


def test_another_model_starts_at_its_own_loops(app: AppTest) -> None:
    opened(app, "lens")
    assert app.slider(key="loops").value == 3
    app.selectbox(key="model").select("automaton-twin").run()
    assert app.slider(key="loops").value == 1
    app.slider(key="loops").set_value(4).run()
    assert any("trained with its layers run once" in caption.value for caption in app.caption)


def test_selections_are_read_from_the_address_and_stay_when_the_page_changes(app: AppTest) -> None:
    opened(app, "attention", model="automaton-deep", loops="2", example="7", t="0.5")
    for page in ("denoise", "verdict", "lens"):
        healthy(app.switch_page(f"views/{page}.py").run())
    assert app.selectbox(key="model").value == "automaton-deep"
    assert app.slider(key="loops").value == 2
    assert app.number_input(key="example").value == 7
    assert app.slider(key="t").value == 0.5


def test_a_mask_that_is_none_is_said_so(app: AppTest) -> None:
    opened(app, "lens", masking="by hand", mask="xyz")
    assert "a mask for 24 positions is 6 hexadecimal digits" in app.warning[0].value
    assert "18 of 18 free positions masked" in [caption.value for caption in app.caption]


def test_mask_buttons_draw_by_hand(app: AppTest) -> None:
    opened(app, "lens")
    app.button(key="mask-Show all").click().run()
    assert app.segmented_control(key="masking").value == selection.BY_HAND
    assert "0 of 18 free positions masked" in [caption.value for caption in app.caption]
    healthy(app).button(key="mask-Invert").click().run()
    assert "18 of 18 free positions masked" in [caption.value for caption in app.caption]
    assert app.text_input(key="mask").value == "03ffff"


def test_adaptive_looping_uses_fewer_loops(app: AppTest) -> None:
    opened(app, "denoise", loops="24", steps="3")
    fixed = [metric.value for metric in app.metric]
    app.toggle(key="adaptive").set_value(True).run()
    app.slider(key="threshold").set_value(0.5).run()
    assert fixed[2] == str(3 * 24)
    assert int([metric.value for metric in healthy(app).metric][2]) < 3 * 24
    app.slider(key="step").set_value(2).run()
    app.slider(key="steps").set_value(1).run()   # fewer steps than the one that was shown
    assert not healthy(app).slider(key="temperature").disabled


def test_a_step_says_how_far_each_loop_moved_the_state(app: AppTest) -> None:
    checkpoint = data.checkpoints()["automaton-loop"]
    entry = data.load_entry(checkpoint)
    batch = entry.task.sample(2, seed=0, split="test")
    noised = batch.tokens.masked_fill(batch.free, entry.task.mask_token_id)
    config = {"n_steps": 3, "order": "confidence", "n_loops": 4, "exit_threshold": None, "temperature": 0.0}
    for step in compute.trace_of(checkpoint, compute.rows(noised), config, 0):
        before = torch.from_numpy(step["before"])
        layer = entry.model.config.n_head_layers + entry.model.config.n_loop_layers - 1
        site = f"blocks.{layer}.hook_resid_post"
        _, rec = entry.model.run_with_cache(before, 4, names_filter=site, t=float(step["t"]))
        states = rec.stack(site)[:, before == entry.task.mask_token_id]
        relative = (states.diff(dim=0).norm(dim=-1) / states[:-1].norm(dim=-1)).mean(1)
        assert np.isnan(step["change"][0])
        np.testing.assert_allclose(step["change"][1:], relative, rtol=1e-4)


def test_the_verdict_shows_words_table_and_provenance(app: AppTest, folders: tuple[Path, Path]) -> None:
    verdict = json.loads((folders[1] / "stage_test" / "verdict.json").read_text())
    opened(app, "verdict")
    text = "\n".join(str(part.value) for part in (*app.title, *app.markdown))
    for words in (verdict["question"], verdict["answer"], *verdict["words"], *verdict["open"]):
        assert words in text
    assert {f"chart-stage_test-{name}" for name in ("matrices", "stages", "gains")} <= set(figures(app))
    assert app.dataframe[0].value["subject"].tolist() == [row["subject"] for row in verdict["subjects"]]
    assert {button.key for button in app.get("download_button")} >= {"report", "json"}


def test_the_dynamics_page_tells_no_factor_by_which_loops_contract(app: AppTest) -> None:
    """A state that grows by one vector again and again nears its own end as 1/k: no factor per loop describes it."""
    opened(app, "dynamics", loops="8")
    said = "\n".join(str(part.value) for part in (*app.caption, *app.info))
    assert "multiplies" not in said
    assert "direction settled" in said
    assert "the direction's distance" in said


@pytest.mark.parametrize("damage", ["gone", "half"])
def test_missing_or_damaged_results_name_the_command(app: AppTest, damage: str, tmp_path: Path,
                                                     folders: tuple[Path, Path],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPSCOPE_RESULTS", str(tmp_path))
    if damage == "half":
        (tmp_path / "stage_test").mkdir()
        (tmp_path / "stage_test" / "verdict.json").write_text("{}")
    app.run()
    assert not app.exception
    said = app.info[0].value if damage == "gone" else app.warning[0].value
    assert "python studies/stage_test.py" in said


def test_an_empty_zoo_and_a_broken_model_are_said_so(app: AppTest, tmp_path: Path, folders: tuple[Path, Path],
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPSCOPE_ZOO", str(tmp_path))
    app.run().switch_page("views/lens.py").run()
    assert "python studies/pretrain.py --preset automaton" in app.error[0].value
    broken = make_zoo(tmp_path) / "automaton-loop" / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    app.run()
    assert not app.exception
    assert "model.safetensors is not a whole safetensors file" in app.error[0].value


def test_a_retrained_model_is_another_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPSCOPE_ZOO", str(make_zoo(tmp_path)))
    before = data.checkpoints()["automaton-loop"]
    tokens = compute.rows(TASK.sample(1, seed=0).tokens)
    lens = compute.lens_of(before, tokens, tokens, 2, 1.0, "logit")
    entry = load(tmp_path / "automaton-loop")
    with torch.no_grad():
        entry.model.embed.weight.add_(1)
    entry.model.save_pretrained(tmp_path / "automaton-loop")
    after = data.checkpoints()["automaton-loop"]
    assert after != before
    assert not compute.lens_of(after, tokens, tokens, 2, 1.0, "logit").equals(lens)
    monkeypatch.setenv("LOOPSCOPE_DEVICE", "cuda")
    assert data.checkpoints()["automaton-loop"] != after


@pytest.mark.parametrize("n", [1, 4, 24, 97])
def test_masks_survive_the_address_bar(n: int) -> None:
    hidden = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.5
    assert torch.equal(selection.decode_mask(selection.encode_mask(hidden), n), hidden)
    with pytest.raises(ValueError, match="hexadecimal digits"):
        selection.decode_mask(selection.encode_mask(hidden) + "0", n)


def test_only_the_app_imports_streamlit_and_figures_do_not() -> None:
    for file in ROOT.glob("*/**/*.py"):
        folder = file.relative_to(ROOT).parts[0]
        if folder not in ("hooks", "probes", "studies", "app"):
            continue
        names = {alias.name.partition(".")[0] for node in ast.walk(ast.parse(file.read_text()))
                 if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module.partition(".")[0] for node in ast.walk(ast.parse(file.read_text()))
                  if isinstance(node, ast.ImportFrom) and node.module}
        if folder != "app" or "figures" in file.parts:
            assert "streamlit" not in names, file
        if "figures" in file.parts:
            assert not names & {"torch", "hooks"}, f"{file} draws, and must not compute"


@pytest.mark.parametrize("study", sorted(path.parent.name for path in (ROOT / "results").glob("*/verdict.json")))
def test_every_bundled_study_is_shown(app: AppTest, study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOOPSCOPE_RESULTS", str(ROOT / "results"))
    opened(app, "verdict", study=study)
    assert app.title[0].value
    assert app.get("plotly_chart") or study.startswith("claims"), "a figure; claims have pictures"
    assert all(labelled(drawn) for drawn in figures(app).values())
