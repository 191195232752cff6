"""First half of `rerun.py`: does each loop do the same thing?

Measures, for the LoopMDM, for the deep twin cut into pseudo-loops and for an untrained
LoopMDM: pattern distances within and between layers, variance partition of signatures,
accuracy with attention frozen, and the likeness of the mean cycle to the unlooped twin.

    setting = Setting.draw(models, untrained, n_examples=192, t=1.0, seed=0)
    operation = measure(setting)
    operation.rows, operation.datasets
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from tqdm import tqdm

from hooks import HookedLoopMDM
from hooks.model.diffusion import corrupt
from probes import stages
from probes.cycles import Cycle, own_loops, pseudo_loops
from probes.intervals import Interval, bootstrap
from probes.measurement import measurement
from studies.tasks import Batch, Task
from studies.zoo import Entry

SUBJECTS = {"loop": "LoopMDM", "control": "deep twin, pseudo-loops", "untrained": "untrained LoopMDM"}


@dataclass(frozen=True)
class Setting:
    """What both halves of the study look at: models, held-out examples, masks."""

    task: Task
    models: Mapping[str, Entry]
    untrained: HookedLoopMDM
    batch: Batch
    noised: torch.Tensor
    t: float
    seed: int
    n_loops: int

    @classmethod
    def draw(cls, models: Mapping[str, Entry], untrained: HookedLoopMDM, *, n_examples: int, t: float, seed: int,
             n_loops: int | None = None) -> Setting:
        """Held-out examples with free positions masked at level ``t`` (1: all of them)."""
        task = models["loop"].task
        batch = task.sample(n_examples, seed=seed, split="test")
        noised = _masked(task, batch, t, seed)
        pseudo = pseudo_loops(models["deep"].model.topology(1), models["loop"].model.config.n_loop_layers)
        return cls(task, models, untrained, batch, noised, t, seed, n_loops or pseudo.n_loops)

    def masked(self, batch: Batch, *, seed: int) -> tuple[Batch, torch.Tensor]:
        """Another batch, masked at the same level."""
        return batch, _masked(self.task, batch, self.t, seed)

    def subjects(self) -> dict[str, list[tuple[HookedLoopMDM, Cycle]]]:
        """Each subject's model and cycle; the deep twin's once per place where the cutting may start."""
        loop, deep = self.models["loop"].model, self.models["deep"].model
        n_layers = loop.config.n_loop_layers
        offsets = range(deep.config.n_loop_layers % n_layers + 1)
        return {"loop": [(loop, own_loops(loop.topology(self.n_loops)))],
                "control": [(deep, pseudo_loops(deep.topology(1), n_layers, offset=o)) for o in offsets],
                "untrained": [(self.untrained, own_loops(self.untrained.topology(self.n_loops)))]}

    def bootstrap(self, statistic: Callable[..., float], *samples: np.ndarray) -> Interval:
        """An interval over the held-out examples, the first axis of every sample."""
        return bootstrap(statistic, *samples, seed=self.seed)


def _masked(task: Task, batch: Batch, t: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return corrupt(batch.tokens, t, task.mask_token_id, free=batch.free, generator=generator)


@dataclass
class Operation:
    """Table rows (each with an interval per subject) and the datasets behind the figures."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    datasets: dict[str, xr.Dataset] = field(default_factory=dict)

    def value(self, key: str, subject: str) -> Interval:
        row = next(row for row in self.rows if row["key"] == key)
        interval: Interval = row["values"][subject]
        return interval

    def add(self, key: str, measure: str, definition: str, expected: str, **values: Interval) -> None:
        self.rows.append({"key": key, "measure": measure, "definition": definition, "expected": expected,
                          "values": values})


def measure(setting: Setting) -> Operation:
    """All of the operation half, with a progress bar."""
    operation = Operation()
    steps = (_patterns, _partition, _frozen, _twin_likeness)
    for step in tqdm(steps, desc="operation", leave=False):
        step(setting, operation)
    return operation


def _patterns(setting: Setting, operation: Operation) -> None:
    """Pattern distance of the same layer across loops against that of different layers."""
    within, between, ratio = {}, {}, {}
    matrices = {}
    for subject, cycles in setting.subjects().items():
        grams = [stages.pattern_gram(model, setting.noised, cycle, t=setting.t) for model, cycle in cycles]
        distances = [stages.head_distances(gram) for gram in grams]
        pairs = [stages.repeat_distances(distance) for distance in distances]
        same = np.mean([pair[0] for pair in pairs], axis=0)
        other = np.mean([pair[1] for pair in pairs], axis=0)
        within[subject] = setting.bootstrap(np.mean, same)
        between[subject] = setting.bootstrap(np.mean, other)
        ratio[subject] = setting.bootstrap(lambda s, o: s.mean() / o.mean(), same, other)
        matrices[f"distance_{subject}"] = _renamed(distances[0].mean("example", keep_attrs=True), subject)
    how = "‖A − B‖_F / √(‖A‖² + ‖B‖²), heads optimally matched, mean over heads and examples"
    operation.add("within", "attention distance, same layer in different loops", how, "LoopMDM lower", **within)
    operation.add("between", "attention distance, different layers", how, "alike", **between)
    operation.add("ratio", "ratio same / different", "1: being the same layer does not matter; 0: loops repeat exactly",
                  "LoopMDM below 1 and below the control", **ratio)
    operation.datasets["pattern_distance"] = xr.Dataset(matrices)


def _renamed(distance: xr.DataArray, subject: str) -> xr.DataArray:
    """Give each subject's matrix axes of its own, so that subjects of unequal size share a dataset."""
    label = [f"layer {i}, loop {k}" for k, i in zip(distance.loop.values, distance.layer.values, strict=True)]
    axes = (f"place_{subject}", f"other_{subject}")
    return measurement(distance.values, axes, coords={axes[0]: label, axes[1]: label},
                       long_name=f"attention distance, {SUBJECTS[subject]}", units="1",
                       definition=str(distance.attrs["definition"]), source=str(distance.attrs["source"]))


def _partition(setting: Setting, operation: Operation) -> None:
    """Variance of the signatures by layer-in-cycle, by loop, and interaction."""
    signatures = {}
    for subject, cycles in setting.subjects().items():
        if subject == "untrained":   # its lens reads nothing: the unembedding starts at zero
            continue
        signatures[subject] = [stages.signature(model, setting.noised, setting.batch.tokens, cycle, t=setting.t)
                               for model, cycle in cycles]
    for part, expected in (("layer", "LoopMDM higher"), ("loop", "LoopMDM lower"), ("interaction", "–")):
        share = partial(_share, part)
        values = {subject: setting.bootstrap(share, *(s.values for s in found))
                  for subject, found in signatures.items()}
        operation.add(f"variance_{part}", f"variance of signatures by {part}",
                      "two-way decomposition over loop × layer, mean over features", expected, **values)
    operation.datasets["signature"] = xr.Dataset(
        {f"signature_{subject}": found[0].mean("example", keep_attrs=True).rename(
            loop=f"loop_{subject}", layer=f"layer_{subject}") for subject, found in signatures.items()})


def _share(part: str, *signatures: np.ndarray) -> float:
    """One part of the variance partition, averaged over the places where the control may be cut."""
    return float(np.mean([stages.variance_partition(values.mean(0))[part] for values in signatures]))


def _frozen(setting: Setting, operation: Operation) -> None:
    """Accuracy when later loops must look where an earlier loop looked."""
    free = setting.batch.free
    curves: dict[str, xr.DataArray] = {}
    values, normal = {}, {}
    for subject, cycles in setting.subjects().items():
        if subject == "untrained":
            continue
        model, cycle = cycles[0]
        matching = stages.pattern_gram(model, setting.noised, cycle, t=setting.t) if subject == "control" else None
        unfrozen = model(setting.noised, cycle.topology.n_loops, t=setting.t).argmax(-1)
        answers = [stages.frozen_attention(model, setting.noised, cycle, after=k, matching=matching, t=setting.t)
                   for k in range(cycle.n_loops - 1)]
        right = np.stack([((a == setting.batch.tokens) & free).sum(1) / free.sum(1) for a in [*answers, unfrozen]])
        curves[f"accuracy_{subject}"] = measurement(
            right.mean(1), (f"after_{subject}",), coords={f"after_{subject}": np.arange(cycle.n_loops)},
            long_name=f"accuracy with attention frozen, {SUBJECTS[subject]}", units="probability",
            definition="share of free cells right when every later loop reuses the attention patterns of this one; "
                       "the last entry is the model unfrozen", source="after arXiv 2604.11791")
        middle = min(1, cycle.n_loops - 2)
        values[subject] = setting.bootstrap(np.mean, right[middle])
        normal[subject] = setting.bootstrap(np.mean, right[-1])
    operation.add("unfrozen", "accuracy at this depth", "share of free cells right", "–", **normal)
    operation.add("frozen", "accuracy, attention frozen after the second loop",
                  "every later loop reuses the second loop's attention patterns (control: heads matched first)",
                  "LoopMDM loses less", **values)
    operation.datasets["frozen_attention"] = xr.Dataset(curves)


def _likeness(ours: np.ndarray, theirs: np.ndarray) -> float:
    return stages.profile_correlation(ours.mean(0), theirs.mean(0))


def _twin_likeness(setting: Setting, operation: Operation) -> None:
    """Correlation of the mean cycle with the unlooped twin, layer by layer."""
    loop, twin = setting.models["loop"].model, setting.models["twin"].model
    noised, truth = setting.noised, setting.batch.tokens
    config = loop.config
    n_head, n_mid = config.n_head_layers, config.n_loop_layers
    depth = config.topology(setting.n_loops).depth
    unrolled = Cycle(config.topology(setting.n_loops), (tuple(range(depth)),))
    ours = stages.signature(loop, noised, truth, unrolled, t=setting.t).values[:, 0]
    theirs = stages.signature(twin, noised, truth, stages.whole(twin.config), t=setting.t).values[:, 0]
    cycle = ours[:, n_head:n_head + setting.n_loops * n_mid].reshape(len(ours), setting.n_loops, n_mid, -1).mean(1)
    profile = np.concatenate([ours[:, :n_head], cycle, ours[:, n_head + setting.n_loops * n_mid:]], axis=1)
    mid = range(n_head, n_head + n_mid)
    shuffled = [*range(n_head), *reversed(mid), *range(n_head + n_mid, config.n_layers)]
    operation.add("twin", "correlation of the mean cycle with the unlooped twin's layers",
                  "Pearson r of layer profiles (head, mean cycle, tail), features standardised over layers; "
                  "control: the same with the cycle's layers in reverse order", "LoopMDM above its control",
                  loop=setting.bootstrap(_likeness, profile, theirs),
                  control=setting.bootstrap(_likeness, profile[:, shuffled], theirs))
    names = [f"head {i}" for i in range(n_head)] + [f"mid {i}" for i in range(n_mid)] + [
        f"tail {i}" for i in range(config.n_tail_layers)]
    operation.datasets["profile"] = xr.Dataset({
        key: measurement(np.nanmean(value, axis=0), ("layer", "feature"), long_name=f"layer profile, {label}",
                         units="1", coords={"layer": names, "feature": list(stages.FEATURES)},
                         definition="mean over examples (and over loops) of each feature of the signature",
                         source="after arXiv 2604.11791")
        for key, value, label in (("loop", profile, "LoopMDM"), ("twin", theirs, "unlooped twin"))})
