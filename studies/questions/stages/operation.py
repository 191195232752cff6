"""First half of `rerun.py`: what is alike from loop to loop?

Describes the LoopMDM, the deep twin cut into pseudo-loops and untrained LoopMDMs: pattern
distances within and between layers, variance partition of signatures, accuracy with
attention frozen, and the likeness of the mean cycle to the unlooped twin. None of it decides
whether an operation is repeated: shared weights bring likeness without any training.

    setting = Setting.draw(models, n_examples=192, t=1.0, seed=0, n_untrained=8)
    operation = measure_operation(setting)
    operation.rows, operation.datasets
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from probes.intervals import Interval, NotDefined, NotDefinedError, Spread, bootstrap
from probes.measurement import measurement
from studies.checks import at_least, noise_level
from studies.tasks import Batch, Task
from studies.zoo import Entry

SUBJECTS = {"loop": "LoopMDM", "control": "deep twin, pseudo-loops", "untrained": "untrained LoopMDM"}

Value = Interval | NotDefined
"""A number with its interval, or why there is none."""


@dataclass(frozen=True)
class Setting:
    """What both halves of the study look at: models, held-out examples, masks."""

    task: Task
    models: Mapping[str, Entry]
    untrained: tuple[HookedLoopMDM, ...]
    batch: Batch
    noised: torch.Tensor
    t: float
    seed: int
    n_loops: int

    @classmethod
    def draw(cls, models: Mapping[str, Entry], *, n_examples: int, t: float, seed: int, n_untrained: int,
             n_loops: int | None = None) -> Setting:
        """Held-out examples with free positions masked at level ``t`` (1: all of them), and untrained models.

        ``n_loops`` (None: as many as the deep twin has pseudo-loops) are compared. Raises ValueError for a level
        outside (0, 1], fewer than 2 loops, examples or untrained models, and a deep twin too shallow to be cut.
        """
        noise_level(t)
        at_least(2, n_examples=n_examples, n_untrained=n_untrained, n_loops=n_loops)
        task = models["loop"].task
        batch = task.sample(n_examples, seed=seed, split="test")
        noised = _masked(task, batch, t, seed)
        pseudo = pseudo_loops(models["deep"].model.topology(1), models["loop"].model.config.n_loop_layers)
        untrained = tuple(_initialised(models["loop"].model, seed=seed + i) for i in range(n_untrained))
        return cls(task, models, untrained, batch, noised, t, seed, n_loops or pseudo.n_loops)

    def masked(self, batch: Batch, *, seed: int) -> tuple[Batch, torch.Tensor]:
        """Another batch, masked at the same level."""
        return batch, _masked(self.task, batch, self.t, seed)

    def subjects(self) -> dict[str, list[tuple[HookedLoopMDM, Cycle]]]:
        """Each subject's models and cycles: the deep twin's once per place where the cutting may start, and every
        untrained model's."""
        loop, deep = self.models["loop"].model, self.models["deep"].model
        n_layers = loop.config.n_loop_layers
        offsets = range(deep.config.n_loop_layers % n_layers + 1)
        return {"loop": [(loop, own_loops(loop.topology(self.n_loops)))],
                "control": [(deep, pseudo_loops(deep.topology(1), n_layers, offset=o)) for o in offsets],
                "untrained": [(model, own_loops(model.topology(self.n_loops))) for model in self.untrained]}

    def bootstrap(self, statistic: Callable[..., float], *samples: np.ndarray | xr.DataArray) -> Value:
        """An interval over the held-out examples, the first axis of every sample; or why there is none."""
        try:
            return bootstrap(statistic, *samples, seed=self.seed)
        except NotDefinedError as error:
            return NotDefined(str(error))

    def value(self, subject: str, statistic: Callable[..., float],
              samples: Sequence[np.ndarray | xr.DataArray]) -> Value:
        """``statistic`` of a subject that was measured once per model and cycle.

        Untrained models: a value of each, and their spread. Others: the mean over cuts, with an interval over examples.
        """
        if subject == "untrained":
            try:
                return Spread.of([float(statistic(sample)) for sample in samples])
            except NotDefinedError as error:
                return NotDefined(str(error))
        return self.bootstrap(lambda *resampled: float(np.mean([statistic(sample) for sample in resampled])), *samples)


def _initialised(model: HookedLoopMDM, *, seed: int) -> HookedLoopMDM:
    """An untrained model of the same shape."""
    untrained = HookedLoopMDM(model.config).eval()
    untrained.reset_parameters(torch.Generator().manual_seed(seed))
    return untrained


def _masked(task: Task, batch: Batch, t: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return corrupt(batch.tokens, t, task.mask_token_id, free=batch.free, generator=generator)


@dataclass
class Operation:
    """Table rows (each with a value per subject) and the datasets behind the figures."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    datasets: dict[str, xr.Dataset] = field(default_factory=dict)

    def value(self, key: str, subject: str) -> Value:
        row = next(row for row in self.rows if row["key"] == key)
        value: Value = row["values"][subject]
        return value

    def add(self, key: str, measure: str, definition: str, **values: Value) -> None:
        self.rows.append({"key": key, "measure": measure, "definition": definition, "values": values})


def measure_operation(setting: Setting) -> Operation:
    """All of the operation half, with a progress bar."""
    operation = Operation()
    steps = (_patterns, _partition, _frozen, _twin_likeness)
    for step in tqdm(steps, desc="operation", leave=False):
        step(setting, operation)
    return operation


def _patterns(setting: Setting, operation: Operation) -> None:
    """Pattern distance of the same layer across loops against that of different layers."""
    values: dict[str, dict[str, Value]] = {"within": {}, "between": {}, "ratio": {}}
    matrices = {}
    for subject, cycles in setting.subjects().items():
        distances = [stages.head_distances(stages.pattern_gram(model, setting.noised, cycle, t=setting.t))
                     for model, cycle in cycles]
        for key, statistic in (("within", _same_layer), ("between", _other_layer), ("ratio", _ratio)):
            values[key][subject] = setting.value(subject, statistic, distances)
        matrices[f"distance_{subject}"] = _renamed(distances[0].mean("example", keep_attrs=True), subject)
    how = "‖A − B‖_F / √(‖A‖² + ‖B‖²), heads optimally matched, mean over heads and examples"
    operation.add("within", "attention distance, same layer in different loops", how, **values["within"])
    operation.add("between", "attention distance, different layers", how, **values["between"])
    operation.add("ratio", "ratio same / different", "the first distance ÷ the second. 1: being the same layer does "
                  "not matter; 0: attention is the same in all loops. Shared weights alone bring it below 1",
                  **values["ratio"])
    operation.datasets["pattern_distance"] = xr.Dataset(matrices)


def _same_layer(distances: xr.DataArray) -> float:
    return float(stages.same_layer_distance(distances).mean())


def _other_layer(distances: xr.DataArray) -> float:
    return float(stages.other_layer_distance(distances).mean())


def _ratio(distances: xr.DataArray) -> float:
    return stages.distance_ratio(_same_layer(distances), _other_layer(distances))


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
    for part in ("layer", "loop", "interaction"):
        values = {subject: setting.value(subject, partial(_share, part), [s.values for s in found])
                  for subject, found in signatures.items()}
        operation.add(f"variance_{part}", f"variance of signatures by {part}",
                      "two-way decomposition over loop × layer, mean over features", **values)
    operation.datasets["signature"] = xr.Dataset(
        {f"signature_{subject}": found[0].mean("example", keep_attrs=True).rename(
            loop=f"loop_{subject}", layer=f"layer_{subject}") for subject, found in signatures.items()})


def _share(part: str, signature: np.ndarray) -> float:
    return stages.variance_partition(stages.example_mean(signature))[part]


def _frozen(setting: Setting, operation: Operation) -> None:
    """Accuracy when later loops must look where an earlier loop looked."""
    free = setting.batch.free
    curves: dict[str, xr.DataArray] = {}
    values: dict[str, dict[str, Value]] = {"unfrozen": {}, "frozen": {}, "lost": {}}
    after = min(1, setting.n_loops - 2)
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
        frozen = right[min(after, cycle.n_loops - 2)]
        for key, sample in (("unfrozen", right[-1]), ("frozen", frozen), ("lost", right[-1] - frozen)):
            values[key][subject] = setting.bootstrap(np.mean, sample)
    which = ("first", "second")[after]
    how = (f"every later loop reuses the attention patterns of the {which} one (pseudo-loops of the deep twin: heads "
           "matched first)")
    operation.add("unfrozen", "accuracy at this depth", "share of free cells right", **values["unfrozen"])
    operation.add("frozen", f"accuracy, attention frozen after the {which} loop", how, **values["frozen"])
    operation.add("lost", f"accuracy lost by freezing attention after the {which} loop",
                  f"difference of the two accuracies; {how}", **values["lost"])
    operation.datasets["frozen_attention"] = xr.Dataset(curves)


def _likeness(ours: np.ndarray, theirs: np.ndarray) -> float:
    return stages.profile_correlation(stages.example_mean(ours), stages.example_mean(theirs))


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
                  "second column: the same with the cycle's layers in reverse order",
                  loop=setting.bootstrap(_likeness, profile, theirs),
                  control=setting.bootstrap(_likeness, profile[:, shuffled], theirs))
    names = [f"head {i}" for i in range(n_head)] + [f"mid {i}" for i in range(n_mid)] + [
        f"tail {i}" for i in range(config.n_tail_layers)]
    operation.datasets["profile"] = xr.Dataset({
        key: measurement(stages.example_mean(value), ("layer", "feature"), long_name=f"layer profile, {label}",
                         units="1", coords={"layer": names, "feature": list(stages.FEATURES)},
                         definition="mean over examples (and over loops) of each feature of the signature",
                         source="after arXiv 2604.11791")
        for key, value, label in (("loop", profile, "LoopMDM"), ("twin", theirs, "unlooped twin"))})
