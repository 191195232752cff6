"""Every example in a docstring: commands name scripts and options that exist, Python fits the signatures, and runs.

What an example only mentions (``model``, ``noised``) is given to it, small. Those in `BOUND_ONLY` would train, measure
for minutes, reach for a network or a page: their calls are bound to signatures, and not made.
"""

from __future__ import annotations

import ast
import doctest
import functools
import importlib
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from torch import nn

from hooks import HookedLoopMDM
from hooks.hook_points import HookPoint, LoopClock
from hooks.model.diffusion import SamplerConfig, sample
from tests.small_looped import looped

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").is_file())
PACKAGES = ("hooks", "probes", "studies", "app", "benchmarks")

FORMULAS = {"hooks/model/loopmdm.py": "H(0) = head(tokens)", "studies/questions/controls/codec.py": "code_k(y) + "}
"""Indented blocks that are formulas: file, and how they begin."""

BOUND_ONLY = {
    "app/compute.py", "app/data.py", "app/selection.py", "app/show.py",                  # belong to a page
    "benchmarks/measurements.py", "benchmarks/memory.py", "benchmarks/report.py", "benchmarks/speed.py",  # take minutes
    "benchmarks/timing.py",
    "hooks/bridges/checkpoints.py", "studies/tasks/brown.py",                            # files of other people
    "hooks/foreign/adopt.py", "hooks/foreign/architectures.py", "hooks/foreign/firings.py",
    "hooks/foreign/loopify.py", "hooks/foreign/watching.py", "hooks/foreign/replay.py", "hooks/foreign/discovery.py",
    "studies/questions/claims/measure.py", "studies/questions/recipe/measure.py", "studies/training/run.py",
    "studies/questions/ablations/measure.py", "studies/questions/length_generalization/measure.py",
    "studies/questions/stage_test/measure.py", "studies/questions/choices/measure.py",   # train or measure
    "probes/alignment.py", "probes/calibration.py", "probes/gains.py", "probes/stage_rule.py",
    "probes/stage_test.py", "probes/stage_text.py",
    *(f"studies/questions/controls/{name}.py" for name in (
        "__init__", "codec", "codec_files", "counter", "far", "gated", "per_loop", "retraining", "switched",
        "unrolled", "untrained")),
    "studies/questions/calibrate/measure.py",                                            # train or measure
    "studies/training/step.py",                                                          # compiles
}


class Example(NamedTuple):
    """One indented block of a docstring."""

    path: str
    code: str


def blocks(doc: str, margin: int) -> Iterator[str]:
    """The parts of a docstring that are indented by four or more beyond its own margin."""
    held: list[str] = []
    for number, line in enumerate([*doc.expandtabs().splitlines(), "end"]):
        if number and line.strip() and len(line) - len(line.lstrip()) >= margin + 4 and line != "end":
            held.append(line[margin + 4:])
        elif held and not line.strip():
            held.append("")
        elif held:
            yield "\n".join(held).rstrip()
            held = []


def examples() -> list[Example]:
    found = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        name = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef):
                doc = ast.get_docstring(node, clean=False)
                margin = 0 if isinstance(node, ast.Module) else node.col_offset + 4
                found += [Example(name, code) for code in blocks(doc or "", margin)
                          if not code.startswith(FORMULAS.get(name, "\0"))]
    return found


COMMAND = re.compile(r"^(python|streamlit|npm|make|accelerate|pip) ")
EVERY = examples()
COMMANDS = [example for example in EVERY if COMMAND.match(example.code)]
DOCTESTS = [example for example in EVERY if example.code.startswith(">>>")]
PYTHON = [example for example in EVERY if example not in COMMANDS and example not in DOCTESTS]


def named(example: Example) -> str:
    return f"{example.path}:{example.code.splitlines()[0][:40]}"


def compiled(code: str) -> ast.Module:
    return ast.parse(re.sub(r'(?<!")…(?!")', "...", code) if "…" in code else code)


def test_there_are_examples_of_every_kind() -> None:
    assert min(map(len, (COMMANDS, DOCTESTS))) > 3
    assert len(PYTHON) > 60
    assert set(BOUND_ONLY) <= {example.path for example in PYTHON}, "no file is left out that has no example"


# ---------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("example", COMMANDS, ids=named)
def test_commands_name_scripts_and_options_that_exist(example: Example) -> None:
    for line in example.code.splitlines():
        words = shlex.split(line.partition(" # ")[0].replace("<", "'").replace(">", "'"))
        if not words or words[0] not in ("python", "streamlit") or (words[1:2] == ["-m"] and words[2] == "app"):
            continue
        target = words[2].replace(".", "/") + ".py" if words[1] == "-m" else words[1 if words[0] == "python" else 2]
        script = ROOT / target
        assert script.is_file(), f"{line}: there is no {target}"
        for option in (word for word in words if word.startswith("--")):
            name = option.removeprefix("--").removeprefix("no-").replace("-", "_")
            assert re.search(rf"\b{name}\b(:|\"|')|--{option[2:]}", script.read_text()), f"{target} has no {option}"


# ------------------------------------------------------------------------------------- signatures


def namespace(path: str) -> dict[str, Any]:
    """What an example sees: all that is public in the packages, by name; its own folder and module come first."""
    found: dict[str, Any] = {"np": np, "torch": torch, "xr": xr, "pd": pd, "Path": Path}
    others = [str(other.relative_to(ROOT)) for package in PACKAGES[:3] for other in (ROOT / package).rglob("*.py")]
    for name in sorted(others, key=lambda name: (name.rpartition("/")[0] == path.rpartition("/")[0], name)):
        if "/examples/" not in name and "bridges/hf" not in name:
            found |= public(name)
    if "app/views" not in path:
        found |= {key: value for key, value in vars(importlib.import_module(dotted(path))).items() if key[:2] != "__"}
    return found


@functools.cache
def public(path: str) -> dict[str, Any]:
    """What a module makes for others."""
    module = importlib.import_module(dotted(path))
    return {key: value for key, value in vars(module).items()
            if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__}


def dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def bind(call: ast.Call, known: dict[str, Any]) -> None:
    """TypeError if a call cannot be that of the function it names; functions that are not known pass."""
    target: Any = None
    if isinstance(call.func, ast.Name):
        target = known.get(call.func.id)
    elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        holder = HookedLoopMDM if call.func.value.id == "model" else known.get(call.func.value.id)
        if inspect.ismodule(holder) or inspect.isclass(holder):
            target = getattr(holder, call.func.attr)   # AttributeError: there is no such method
    if not callable(target) or any(isinstance(part, ast.Starred) for part in call.args) or any(
            keyword.arg is None for keyword in call.keywords):
        return
    try:
        signature = inspect.signature(target)
    except ValueError:   # written in C
        return
    of_model = ast.unparse(call.func).startswith("model.") and not inspect.ismethod(target)   # takes self, too
    arguments = [None] * (len(call.args) + of_model)
    signature.bind(*arguments, **{str(keyword.arg): None for keyword in call.keywords})


@pytest.mark.parametrize("example", PYTHON, ids=named)
def test_calls_fit_the_signatures(example: Example) -> None:
    known = namespace(example.path)
    for node in ast.walk(compiled(example.code)):
        if isinstance(node, ast.Call):
            bind(node, known)


def test_a_call_that_does_not_fit_is_found() -> None:
    known = namespace("probes/loop_patterns.py")
    for broken in ("bootstrap(np.mean, values, resamples=3)", "read_lens(model)", "model.run_with_cash(tokens)"):
        call = ast.parse(broken).body[0].value  # type: ignore[attr-defined]
        with pytest.raises((TypeError, AttributeError)):
            bind(call, known)


# ---------------------------------------------------------------------------------------- running


@functools.cache
def read_once() -> tuple[torch.Tensor, Any, xr.Dataset]:
    """(logits, recording, lens) of the examples' model on the examples' tokens."""
    from probes import read_lens

    base = given(fresh=False)
    model, noised = base["model"], base["noised"]
    return (*model.run_with_cache(noised, 8), read_lens(model, noised, n_loops=8, kind="coda", targets=base["tokens"]))


def given(*, fresh: bool = True) -> dict[str, Any]:
    """What examples mention without making it, in small; made afresh, but for what only reading made."""
    from app.figures.grids import Look
    from studies.tasks import Automaton

    torch.manual_seed(0)
    task = Automaton(rule=30, width=12, rows=8)
    model = HookedLoopMDM.from_pretrained(ROOT / "zoo" / "automaton-loop")
    batch = task.sample(6, seed=0)
    noised = batch.tokens.masked_fill(batch.free, task.mask_token_id)
    found = {"task": task, "batch": batch, "tokens": batch.tokens, "noised": noised, "inputs": noised,
             "free": batch.free, "input_ids": noised, "prompt": noised[:2], "mask_token_id": task.mask_token_id,
             "n_loops": 3, "t": torch.full((6,), 0.5), "generator": torch.Generator().manual_seed(0), "model": model,
             "v": torch.zeros(model.config.d_model), "fn": lambda x, hook: x, "norms": [], "text": "words",
             "latent": task.latents(batch.tokens)["cell"], "look": Look.of(task), "regions": task.regions().numpy()}
    if fresh:
        logits, rec, lens = read_once()
        found |= {"logits": logits, "rec": rec, "lens": lens, "predicted": logits.argmax(-1)[0]}
    return found


@functools.cache
def stored_results(name: str) -> Any:
    from studies.results import RESULTS, read_results

    return read_results(RESULTS / name)


def extras(path: str, base: dict[str, Any]) -> dict[str, Any]:
    """What the examples of one file need besides, or otherwise."""
    import plotly.graph_objects as go

    from probes import attention_summary, dynamics, fixed_point, patterns, probe_latent, trajectory_pca
    from studies.questions.calibrate.judge import judge as judge_calibration
    from studies.questions.claims.judge import judge as judge_claims
    from studies.questions.claims.page import Group
    from studies.questions.stage_test.subjects import Examples

    model, noised, task, rec = base["model"], base["noised"], base["task"], base["rec"]
    stored = {name: stored_results(name) for name in (
        "stage_test", "ablations-automaton", "length_generalization-automaton", "claims-automaton", "loops_and_steps",
        "noise_level")}

    def trace() -> list[dict[str, np.ndarray]]:
        steps = sample(model, noised[:1], SamplerConfig(n_steps=4, n_loops=2))
        names = ("before", "after", "predicted", "probability", "loops_used", "revealed")
        return [{name: getattr(step, name).numpy() for name in names} for step in steps]

    def catalogue() -> dict[str, Any]:
        """A setting, a measurement of it, the models that there are, and what one of them gave."""
        from studies.questions.catalogue.entries import ENTRIES
        from studies.questions.catalogue.entries.setting import Setting
        from studies.questions.catalogue.measure import Found
        from studies.questions.catalogue.subjects import measurable

        setting = Setting(model, noised, base["tokens"], noised == task.mask_token_id, n_loops=2)
        lens = ENTRIES["logit_lens"].measure(setting)
        return {"setting": setting, "ENTRIES": ENTRIES, "subjects": measurable(["automaton-loop", "automaton-twin"]),
                "found": {"a model": Found("", {"logit_lens": lens}, {}, {"logit_lens": 1.0})}
                if path.endswith("page.py") else lens}

    def little() -> dict[str, Any]:
        """Short inputs, for what is fitted or differentiated."""
        short = {name: base[name][:, :24] for name in ("noised", "tokens")}
        return {**short, "inputs": short["noised"]}

    def drawn() -> Examples:
        return Examples(noised[:], base["tokens"], noised == task.mask_token_id, None)

    def twice() -> Examples:
        once = drawn()
        return Examples(*(torch.cat([part, part]) for part in (once.inputs, once.targets, once.scored)), None)

    def probed() -> xr.Dataset:
        latent = base["latent"]
        many = task.sample(60, seed=1)
        latent = task.latents(many.tokens)["cell"]
        hidden = many.tokens.masked_fill(many.free, task.mask_token_id)
        groups = task.regions().masked_fill(~(latent.values >= 0).any(0), -1)
        return probe_latent(model, hidden, latent.values, latent.n_classes, n_loops=2, groups=groups)

    def linear() -> dict[str, Any]:
        features, labels = torch.randn(4, 40, 3), torch.arange(40) % 2
        return {"features": features[0].numpy(),
                "list_of_features": features, "other_features": features[1].numpy(), "other_labels": labels.numpy(),
                "example": np.arange(40) // 4, "labels": base["tokens"] % 2 if path.endswith("__init__.py") else labels,
                "n_classes": 2, "groups": torch.zeros(noised.shape[1], dtype=torch.long)}

    residual = rec.residual_stream
    ablations, longer, claims = (stored[name] for name in (
        "ablations-automaton", "length_generalization-automaton", "claims-automaton"))
    stage_tested, stepped, noise = (stored[name] for name in ("stage_test", "loops_and_steps", "noise_level"))
    stage_tested = stage_tested.verdict
    calibrated = {"key": "one", "truth": "programme", "regime": "programme", "sequence": "ABAB", "letters": "ABAB",
                  "n": 16, "kept": True, "family": "codec", "control": "ABAB", "least_equal": 0.9}
    runs = [{"task": "stories", "change": change, "seed": 0, "budget_flops": 1e9, "nelbo": 1.0, "nelbo@1": 1.1,
             "exact": 0.5, "steps": 3, "step": 3, "loops_idle": 0.0, "difficulty": {"name": "stories"}}
            for change in ("recipe", "before")]
    by_file: dict[str, Callable[[], dict[str, Any]]] = {
        "app/figures/attention.py": lambda: {
            "pattern": patterns(model, noised[:1], n_loops=2).isel(batch=0, head=0).rename(depth="panel")[:2],
            "titles": ["one", "two"], "summary": attention_summary(model, noised, n_loops=2)},
        "app/figures/denoise.py": lambda: {"trace": trace(), "progress": {"revealed": np.ones(4), "right": np.ones(4)}},
        "app/figures/dynamics.py": lambda: {
            "pca": trajectory_pca(residual(), 3).assign_coords(layer=residual().layer),
            "moves": dynamics(residual(), rec.topology), "masked": (noised == task.mask_token_id).numpy()[0]},
        "app/figures/lens.py": lambda: {"tokens": base["tokens"][0].numpy()},
        "app/figures/grids.py": lambda: {"tokens": base["tokens"][0].numpy(), "predicted": base["predicted"].numpy()},
        "app/figures/probes.py": lambda: {"result": probed()},
        "app/figures/style.py": lambda: {"dataset": base["lens"]},
        "app/figures/training.py": lambda: {"table": pd.DataFrame({"flops": [1e9, 2e9], "nelbo": [2.0, 1.0]})},
        "hooks/bridges/interop.py": lambda: {"bridge": model.unroll(8)},
        "hooks/bridges/weight_views.py": lambda: {"block": model.blocks[1]},
        "hooks/foreign/layouts.py": lambda: {"state": torch.zeros(2, 3, 4)},
        "hooks/foreign/payload.py": lambda: dict(zip(("hidden", "new", "h", "c"), torch.zeros(4, 2), strict=True)),
        "hooks/model/inputs.py": lambda: {"lengths": torch.full((6,), 90), "mask": torch.ones_like(noised)},
        "hooks/foreign/places.py": lambda: {"model": nn.ModuleDict({"core": nn.ModuleList([nn.Linear(2, 2)])})},
        "hooks/foreign/schedules.py": lambda: {"model": looped()},
        "hooks/hook_points.py": lambda: {"clock": LoopClock(), "x": torch.zeros(2)},
        "hooks/model/layers.py": lambda: {"config": model.config, "clock": LoopClock(), "HookPoint": HookPoint,
                                          "x": torch.zeros(1, 3, model.config.d_model), "rotary": model.rotary(3)},
        "hooks/model/loopmdm.py": lambda: {"tokens": base["tokens"][:, :96]},
        "hooks/store.py": lambda: {"config": SamplerConfig(n_steps=4, n_loops=2)},
        "probes/answers.py": lambda: {"run": model.run(noised, 2), "tokens": base["tokens"], "depth": 2,
                                      "versions": torch.stack(model.run(noised, 2).states[:2])},
        "probes/causal.py": little,
        "probes/heads.py": lambda: {"trace": [SimpleNamespace(before=noised)] * 2},
        "probes/linear/__init__.py": linear,
        "probes/linear/estimators.py": linear,
        "probes/linear/solvers.py": lambda: {
            "x": torch.randn(2, 40, 3), "y": nn.functional.one_hot(torch.arange(40) % 6).float()},
        "probes/cycles.py": lambda: {"deep_twin": HookedLoopMDM(replace(model.config, n_loop_layers=4, max_loops=1))},
        "probes/geometry.py": lambda: {"fixed_point": fixed_point},
        "probes/lenses/base.py": lambda: dict(zip(("state", "context"), model.enter(noised[:3], 2), strict=True)),
        "probes/lenses/__init__.py": little, "probes/lenses/fitted.py": little, "probes/lenses/jacobian.py": little,
        "probes/lenses/tuned.py": little, "probes/loop_map.py": lambda: {"noised": noised[:1, :12]},
        "probes/measurement.py": lambda: {"values": np.zeros((2, 3))},
        "probes/similarity.py": lambda: {"x": torch.randn(20, 3), "y": torch.randn(20, 4)},
        "studies/checks.py": lambda: {"args": SimpleNamespace(t=0.5, examples=3, results="results")},
        "studies/questions/catalogue/entries/__init__.py": catalogue,
        "studies/questions/catalogue/entries/entry.py": catalogue,
        "studies/questions/catalogue/figures.py": catalogue, "studies/questions/catalogue/measure.py": catalogue,
        "studies/questions/catalogue/page.py": catalogue,
        "studies/palette.py": lambda: {"figure": go.Figure(), "loops": [1, 2], "accuracy": [0.5, 1]},
        "studies/questions/ablations/figures.py": lambda: {"curves": ablations.datasets["curves"]},
        "studies/questions/ablations/judge.py": lambda: {"verdict": ablations.verdict},
        "studies/questions/ablations/page.py": lambda: {"verdict": ablations.verdict,
                                                        "curves": ablations.datasets["curves"]},
        "studies/questions/claims/figures.py": lambda: {"pooled": claims.datasets},
        "studies/questions/claims/judge.py": lambda: {"pooled": claims.datasets},
        "studies/questions/claims/page.py": lambda: {"pooled": claims.datasets, "group": Group(
            "automaton", "automaton", [0], ["automaton-loop"], judge_claims(claims.datasets))},
        "studies/questions/length_generalization/figures.py": lambda: {"curves": longer.datasets["curves"]},
        "studies/questions/length_generalization/judge.py": lambda: {"curves": longer.datasets["curves"]},
        "studies/questions/length_generalization/page.py": lambda: {"curves": longer.datasets["curves"],
                                                                    "verdict": longer.verdict},
        "probes/intervals.py": lambda: {"exchanged": np.ones(48), "left_out": np.ones(48)},
        "studies/questions/calibrate/judge.py": lambda: {"rows": [calibrated]},
        "studies/questions/calibrate/figures.py": lambda: {"found": judge_calibration([calibrated])},
        "studies/questions/calibrate/page.py": lambda: {"stored": {
            "found": judge_calibration([calibrated]), "thresholds": {"date": "today"},
            "provenance": {"program": "python studies/calibrate.py", "seconds": 1.0}}},
        "studies/questions/choices/page.py": lambda: {"rows": [{"subject": "automaton", "choice": "all masked",
                                                                "value": 0.9, "each": [0.9]}]},
        "studies/questions/controls/operations.py": lambda: {"bits": torch.randint(0, 2, (3, 12))},
        "studies/questions/loops_and_steps/measure.py": lambda: {"drawn": drawn()},
        "studies/questions/loops_and_steps/judge.py": lambda: {"found": stepped.datasets["automaton"]},
        "studies/questions/loops_and_steps/figures.py": lambda: {"verdict": stepped.verdict},
        "studies/questions/loops_and_steps/page.py": lambda: {"verdict": stepped.verdict},
        "studies/questions/noise_level/measure.py": lambda: {"drawn": twice()},
        "studies/questions/noise_level/judge.py": lambda: {
            "read": noise.datasets["automaton-read"], "moved": noise.datasets["automaton-moved"]},
        "studies/questions/noise_level/figures.py": lambda: {"verdict": noise.verdict},
        "studies/questions/noise_level/page.py": lambda: {"verdict": noise.verdict},
        "studies/questions/question_page.py": lambda: {"verdict": stepped.verdict},
        "studies/questions/recipe/judge.py": lambda: {"runs": runs},
        "studies/questions/recipe/page.py": lambda: {"runs": runs},
        "studies/questions/stage_test/figures.py": lambda: {"verdict": stage_tested},
        "studies/questions/subject_claims.py": lambda: {"values": xr.DataArray(np.linspace(0, 1, 192), dims="example")},
        "studies/questions/stage_test/judge.py": lambda: {"found": stage_tested["found"]},
        "studies/questions/stage_test/page.py": lambda: {"verdict": stage_tested},
        "studies/results.py": lambda: {"measured": stored["stage_test"].datasets["automaton-loop"]},
        "studies/training/draws.py": lambda: {"model": model.config},
        "studies/training/flops.py": lambda: {"config": model.config},
    }
    return by_file.get(path, dict)()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("example", [e for e in PYTHON if e.path not in BOUND_ONLY], ids=named)
def test_examples_run(example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo").mkdir()
    for folder in (ROOT / "zoo").iterdir():   # what an example saves stays here
        (tmp_path / "zoo" / folder.name).symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    base = given()
    known = {**namespace(example.path), **base, **extras(example.path, base)}
    lines = example.code.splitlines()
    for statement in compiled(example.code).body:
        code = compile(ast.Module([statement], []), example.path, "exec")
        if refusal := re.search(r"# (\w+Error):", lines[(statement.end_lineno or 1) - 1]):
            with pytest.raises(Exception) as raised:  # noqa: PT011 — the example says which
                exec(code, known)
            assert type(raised.value).__name__ == refusal[1]
        else:
            exec(code, known)


@pytest.mark.parametrize("example", DOCTESTS, ids=named)
def test_what_an_example_prints_is_what_it_says(example: Example) -> None:
    test = doctest.DocTestParser().get_doctest(example.code + "\n", namespace(example.path), example.path, None, 0)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
