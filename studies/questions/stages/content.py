"""Second half of `rerun.py`: does the content advance from loop to loop?

It does where more of the answer is there after a loop than before, whatever operation brought
it. Measured three ways: exact accuracy over the number of loops; the coda lens, what
the model would answer if it stopped here; and linear probes, what can be read out at all.

    content = measure_content(setting)
    content.rows, content.datasets
"""

from __future__ import annotations

from itertools import islice

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from hooks import HookedLoopMDM
from probes.cycles import Cycle
from probes.intervals import NotDefinedError
from probes.linear import ridge_probes
from probes.loops import loop_states
from probes.measurement import measurement
from studies.questions.stages.operation import SUBJECTS, Operation, Setting, Value


def measure_content(setting: Setting) -> Operation:
    """All of the content half, with a progress bar."""
    content = Operation()
    for step in tqdm((_accuracy_over_loops, _coda_by_region, _probes_by_region), desc="content", leave=False):
        step(setting, content)
    return content


@torch.no_grad()
def _accuracy_over_loops(setting: Setting, content: Operation) -> None:
    """Share of free cells right, all filled in one forward, over S = 1 … 2·S_max, for the whole triplet."""
    s_max = setting.models["loop"].model.config.max_loops
    loops = np.arange(1, 2 * s_max + 1)
    regions = setting.task.regions()
    curves, by_region = [], []
    for kind in ("loop", "twin", "deep"):
        right = _right_after_each_loop(setting, setting.models[kind].model, len(loops))
        free = setting.batch.free.float()
        curves.append((right * free).sum(-1) / free.sum(-1))
        by_region.append(_by_region(right, free, regions))
    names = ["loop", "twin", "deep"]
    accuracy = torch.stack(curves).numpy()
    content.datasets["accuracy_over_loops"] = xr.Dataset({
        "accuracy": measurement(accuracy.mean(-1), ("kind", "n_loops"), coords={"kind": names, "n_loops": loops},
                                long_name="share of free cells right", units="probability",
                                definition="every free position masked (at t = 1), one forward of S loops; the twins "
                                           "are trained with one loop, and their mid layers repeated S times here",
                                source="arXiv 2605.26106"),
        "accuracy_by_region": measurement(
            torch.stack(by_region).numpy(), ("kind", "n_loops", "region"),
            coords={"kind": names, "n_loops": loops, "region": np.unique(regions.numpy())},
            long_name="share of free cells right, by region", units="probability",
            definition=f"as accuracy, per {setting.task.region_name}", source="arXiv 2605.26106")})
    at = {"one": 0, "max": s_max - 1, "beyond": 2 * s_max - 1}
    loop = accuracy[0]
    content.add("accuracy_max", f"accuracy at S = {s_max}",
                "share of free cells right in one forward; second column: the deep twin as it was trained",
                loop=setting.bootstrap(np.mean, loop[at["max"]]),
                control=setting.bootstrap(np.mean, accuracy[2, 0]))
    content.add("accuracy_gain", f"accuracy gained from S = 1 to S = {s_max}", "difference of the two accuracies",
                loop=setting.bootstrap(np.mean, loop[at["max"]] - loop[0]))
    content.add("accuracy_beyond", f"accuracy gained from S = {s_max} to S = {2 * s_max}",
                "difference of the two accuracies; loops beyond those trained",
                loop=setting.bootstrap(np.mean, loop[at["beyond"]] - loop[at["max"]]))


def _right_after_each_loop(setting: Setting, model: HookedLoopMDM, n_loops: int) -> torch.Tensor:
    """Is each position right after 1, 2 … ``n_loops`` loops: [loop, example, pos]; one forward serves them all."""
    states = islice(loop_states(model, setting.noised, n_loops, t=setting.t), 1, None)
    return torch.stack([model.coda(*after).argmax(-1) == setting.batch.tokens for after in states]).float()


def _by_region(right: torch.Tensor, free: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Accuracy [..., region] over examples and the region's free positions; NaN where none is free."""
    columns = []
    for region in regions.unique():
        on = free * (regions == region)
        columns.append((right * on).sum((-2, -1)) / on.sum())
    return torch.stack(columns, -1)


@torch.no_grad()
def _coda_by_region(setting: Setting, content: Operation) -> None:
    """What the LoopMDM would answer if it stopped after each loop, region by region."""
    loop = setting.models["loop"].model
    s_max = loop.config.max_loops
    right = _right_after_each_loop(setting, loop, s_max)
    free, regions = setting.batch.free.float(), setting.task.regions()
    table = _by_region(right, free, regions)
    labels = np.unique(regions.numpy())
    content.datasets["coda_by_region"] = xr.Dataset({"accuracy": measurement(
        table.numpy(), ("loop", "region"), coords={"loop": np.arange(s_max), "region": labels},
        long_name="coda-lens accuracy by region", units="probability",
        definition=f"share of free cells of a {setting.task.region_name} that the tail gets right when it reads the "
                   "state after this loop", source="arXiv 2507.02199")})
    known = _regions_known(right.numpy(), free.numpy(), regions.numpy(),
                           chance=_majority(setting.batch.tokens[setting.batch.free]))
    content.add("coda_slope", f"{setting.task.region_name}s the coda lens gains per loop",
                "least-squares slope over loops of Σ_regions (accuracy − majority) / (1 − majority), up to S_max",
                loop=setting.bootstrap(_slope, known))


def _probes_by_region(setting: Setting, content: Operation) -> None:
    """Linear probes for the main latent after each loop, region by region, on held-out examples."""
    task, batch = setting.task, setting.batch
    latent_name, latent = next(iter(task.latents(batch.tokens).items()))
    regions = task.regions().numpy()
    variables: dict[str, xr.DataArray] = {}
    chance = _majority(latent.values[batch.free & (latent.values >= 0)])
    slopes: dict[str, Value] = {}
    for subject, cycles in setting.subjects().items():
        measured = cycles if subject == "untrained" else cycles[:1]
        every = [_probe_correct(setting, model, cycle) for model, cycle in measured]
        cycle = measured[0][1]
        table = _by_region(torch.from_numpy(every[0]), batch.free.float(), task.regions())
        axis = f"loop_{subject}"
        variables[f"accuracy_{subject}"] = measurement(
            table.numpy(), (axis, "region"), coords={axis: np.arange(cycle.n_loops), "region": np.unique(regions)},
            long_name=f"linear-probe accuracy by {task.region_name}, {SUBJECTS[subject]}", units="probability",
            definition=f"ridge classifier for the latent '{latent_name}' ({latent.description}) on resid_post of the "
                       "last layer of each (pseudo-)loop, one probe per loop and region, held-out examples",
            source="arXiv 1909.03368")
        slopes[subject] = setting.value(subject, _slope, [
            _regions_known(correct, batch.free.float().numpy(), regions, chance=chance) for correct in every])
    content.datasets["probe_by_region"] = xr.Dataset(variables)
    content.add("probe_slope", f"{task.region_name}s that linear probes gain per loop",
                f"the same slope, for linear probes of '{latent_name}' on the state after each (pseudo-)loop, at "
                "equal depth", **slopes)


def _probe_correct(setting: Setting, model: HookedLoopMDM, cycle: Cycle) -> np.ndarray:
    """Is each position of each held-out example read correctly: [loop, example, pos].

    Probes need more examples than intervals do: they are trained on examples of the training split.
    """
    task, n_test = setting.task, len(setting.noised)
    more, more_noised = setting.masked(task.sample(4 * n_test, seed=setting.seed, split="train"), seed=setting.seed + 1)
    tokens = torch.cat([setting.noised, more_noised])
    latent = next(iter(task.latents(torch.cat([setting.batch.tokens, more.tokens])).values()))
    sites = [cycle.topology.site_at(loop[-1]) for loop in cycle.depths]
    with torch.no_grad():
        _, rec = model.run_with_cache(tokens, cycle.topology.n_loops, t=setting.t, names_filter=sites)
    states = torch.stack([rec[site] for site in sites])
    correct = np.zeros((len(sites), n_test, tokens.shape[1]), dtype=np.float32)
    for region in task.regions().unique():
        positions = (task.regions() == region).nonzero()[:, 0]
        labels = latent.values[:, positions].flatten()
        train = torch.arange(len(tokens)).repeat_interleave(len(positions)) >= n_test
        features = states[:, :, positions].flatten(1, 2)
        predicted = ridge_probes(features, labels, latent.n_classes, train=train).prediction
        hits = torch.as_tensor(predicted.values)[:, ~train] == labels[~train]
        correct[:, :, positions.numpy()] = hits.view(len(sites), n_test, len(positions)).numpy()
    return correct


def _majority(labels: torch.Tensor) -> float:
    """Share of the commonest label: what guessing gets."""
    return float(torch.bincount(labels).max() / len(labels))


def _regions_known(right: np.ndarray, free: np.ndarray, regions: np.ndarray, *, chance: float) -> np.ndarray:
    """[example, loop]: how many regions are known, each counted by its accuracy above chance; NaN if chance is 1."""
    known = np.zeros(right.shape[:2])
    for region in np.unique(regions):
        on = free * (regions == region)
        count = on.sum(-1)
        accuracy = (right * on).sum(-1) / np.maximum(count, 1)
        known += np.where(count > 0, (accuracy - chance) / (1 - chance), 0) if chance < 1 else np.nan
    return known.T


def _slope(known: np.ndarray) -> float:
    """Regions gained per loop: least squares on the mean over examples."""
    if known.shape[1] < 2:
        raise NotDefinedError("there is one loop only, and nothing can be gained per loop")
    if not np.isfinite(known).all():
        raise NotDefinedError("every free position has the same label, which guessing gets right")
    return float(np.polyfit(np.arange(known.shape[1]), known.mean(0), 1)[0])
