"""Lenses that were fitted: their weights, how well they read examples that were kept apart, and their files.

A fitted lens belongs to the weights and the number of loops that it was fitted for, and refuses others.

    lens = TunedLens.fit(model, noised, n_loops=4)
    lens.save("lens.safetensors")
    lens = load_lens("lens.safetensors")
    over_examples(lens.held_out.kl), over_examples(lens.held_out.kl_before)      # [depth], nats, with intervals
    read_lens(model, noised, n_loops=4, kind=lens)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import xarray as xr
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from hooks.topology import Topology
from hooks.writing import written_whole
from probes.batching import in_chunks, select_examples
from probes.lenses.base import Lens, divergence
from probes.measurement import check_run, depth_coords, mean_over_positions, measurement

SPLIT = (0.7, 0.15, 0.15)
"""Shares of the examples to fit on, to stop on, and to judge on."""

FORMAT = "loopscope lens 1"


class FittedLens(Lens):
    """Weights, the model and the layout that they were fitted for, and the divergence on examples kept apart.

    ``held_out`` holds ``kl`` and ``kl_before`` [depth, example]: KL(final ‖ lens) [nat], a mean over an example's
    scored positions, of the lens and of the unfitted lens that it starts from. A lens that was fitted on targets has
    ``nll`` and ``nll_before`` [nat] in their place.
    """

    kinds: ClassVar[dict[str, type[FittedLens]]] = {}

    def __init__(self, weights: Mapping[str, Tensor], *, topology: Topology, model_hash: str, held_out: xr.Dataset,
                 options: Mapping[str, Any]):
        self.weights, self.topology, self.model_hash = dict(weights), topology, model_hash
        self.held_out, self.options = held_out, dict(options)

    def __init_subclass__(cls) -> None:
        FittedLens.kinds[cls.kind] = cls

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.options}, n_loops={self.topology.n_loops})"

    def check(self, model: LoopedModel, topology: Topology) -> None:
        """Raise ValueError for another layout, or other weights, than those that it was fitted for."""
        if _sizes(topology) != _sizes(self.topology):
            raise ValueError(f"this {self.kind} lens was fitted for head, mid, tail and loops of "
                             f"{_sizes(self.topology)}, the run has {_sizes(topology)}: fit one with "
                             f"{type(self).__name__}.fit(model, …, n_loops={topology.n_loops}).")
        if weights_hash(model) != self.model_hash:
            raise ValueError(f"this {self.kind} lens was fitted for other weights than {model.name} has: fit one with "
                             f"{type(self).__name__}.fit(model, …).")

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file, whole or not at all."""
        path = Path(path)
        scores = {f"held_out.{name}": torch.from_numpy(values.values.copy()) for name, values in
                  self.held_out.items()}
        about = {"format": FORMAT, "kind": self.kind, "model": self.model_hash, "options": self.options,
                 "topology": _sizes(self.topology)}
        tensors = {**{name: value.detach().cpu().contiguous() for name, value in self.weights.items()}, **scores}
        with written_whole(path) as temporary:
            save_file(tensors, temporary, {"lens": json.dumps(about)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> FittedLens:
        """Read what `save` wrote. Raises ValueError for a file that is damaged, or holds another kind of lens."""
        found = load_lens(path)
        if not isinstance(found, cls):
            raise ValueError(f"{path} holds a {found.kind} lens: load it with {type(found).__name__}.load, or with "
                             "load_lens.")
        return found


def load_lens(path: str | Path) -> FittedLens:
    """A fitted lens of any kind. Raises FileNotFoundError, and ValueError for a file that is not one."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no lens at {path}: make one with lens.save(…).")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("lens", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}   # noqa: SIM118 - not a dict
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): copy it again, or fit the lens again.") from error
    if about.get("format") != FORMAT or about.get("kind") not in FittedLens.kinds:
        raise ValueError(f"{path} is no lens that this version knows ({about.get('format')}, {about.get('kind')}); it "
                         f"knows {', '.join(FittedLens.kinds)}.")
    n_head, n_mid, n_tail, n_loops = about["topology"]
    topology = Topology(n_head=n_head, n_mid=n_mid, n_tail=n_tail, n_loops=n_loops)
    scores = {name.removeprefix("held_out."): tensors.pop(name) for name in list(tensors)
              if name.startswith("held_out.")}
    return FittedLens.kinds[about["kind"]](tensors, topology=topology, model_hash=about["model"],
                                           held_out=scored_apart(scores, topology), options=about["options"])


def weights_hash(model: LoopedModel) -> str:
    """SHA-256 of the names, shapes, types and values of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(model.module.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


# --------------------------------------------------------------------- what every fit needs

class Fit:
    """Examples in three parts by chance, and passes over them: what `fit` of each lens iterates over.

    Raises ValueError where there are too few examples for three parts, or none is scored.
    """

    def __init__(self, model: LoopedModel, inputs: Inputs, n_loops: int | None, t: Levels,
                 scored: Bool[Tensor, "batch pos"] | None, seed: int, rows: int):
        self.model, self.inputs, self.n_loops, self.t, self.rows = model, inputs, n_loops, t, rows
        self.scored = (model.scored(inputs) if scored is None else scored).bool().cpu()
        n = model.batch_size(inputs)
        if self.scored.ndim != 2 or len(self.scored) != n:
            raise ValueError(f"scored has shape {tuple(self.scored.shape)}; there are {n} examples, [batch, pos].")
        some = torch.nonzero(self.scored.any(1))[:, 0]
        cuts = [round(len(some) * SPLIT[0]), round(len(some) * (SPLIT[0] + SPLIT[1]))]
        order = some[torch.randperm(len(some), generator=torch.Generator().manual_seed(seed))]
        self.fitted, self.stopping, self.judged = order[:cuts[0]], order[cuts[0]:cuts[1]], order[cuts[1]:]
        if not len(self.fitted) or not len(self.stopping) or not len(self.judged):
            raise ValueError(f"{len(some)} examples have a scored position; to fit, to stop and to judge takes at "
                             "least 7: give more.")
        self.topology = model.topology(n_loops)

    def passes(self, part: Int[Tensor, "row"]) -> Iterator[tuple[Int[Tensor, "row"], Any]]:
        """(indices, `hooks.contract.Forward`) of a few examples of a part at a time; states are checked."""
        inputs, t = select_examples(self.model, self.inputs, self.t, part)
        for some, some_t, rows in in_chunks(self.model, inputs, t, size=self.rows):
            with torch.no_grad():
                run = self.model.run(some, self.n_loops, t=some_t)
            check_run(run, answer=False)
            yield part[rows], run

    def no_scores(self) -> xr.Dataset:
        """What stands for the scores of a lens that was not judged yet."""
        return scored_apart({}, self.topology)

    def judge(self, lens: Lens, before: Lens, truth: Int[Tensor, "batch pos"] | None = None) -> xr.Dataset:
        """``kl`` of a lens and ``kl_before`` of another [depth, example], on the examples that were kept apart; with
        clean tokens, ``nll`` and ``nll_before``."""
        name = "kl" if truth is None else "nll"
        found: dict[str, list[Tensor]] = {name: [], f"{name}_before": []}
        for rows, run in self.passes(self.judged):
            log_q = run.logits.float().log_softmax(-1)
            for key, one in zip(found, (lens, before), strict=True):
                values = []
                for depth in range(self.topology.depth):
                    at = torch.full((len(rows),), depth)
                    with torch.no_grad():
                        log_p = one.logits(self.model, run.states[depth + 1], run.context, at).float().log_softmax(-1)
                    cost = divergence(log_q, log_p) if truth is None else \
                        -log_p.gather(-1, truth[rows].to(log_p.device).clamp_min(0).long()[..., None])[..., 0]
                    values.append(mean_over_positions(cost.cpu(), self.scored[rows]))
                found[key].append(torch.stack(values))
        return scored_apart({key: torch.cat(parts, 1) for key, parts in found.items()}, self.topology)


def _sizes(topology: Topology) -> tuple[int, int, int, int]:
    return topology.n_head, topology.n_mid, topology.n_tail, topology.n_loops


def scored_apart(scores: Mapping[str, Tensor], topology: Topology) -> xr.Dataset:
    """Scores [depth, example] of a lens on examples that it was not fitted on, described."""
    told = {"kl": ("divergence of the lens from the answer", "KL(final ‖ lens)"),
            "kl_before": ("divergence of the lens before it was fitted", "KL(final ‖ lens)"),
            "nll": ("NLL of the targets", "−log p(target)"),
            "nll_before": ("NLL of the targets before the lens was fitted", "−log p(target)")}
    more = ", mean over an example's scored positions, on examples that were not fitted on"
    return xr.Dataset({name: measurement(value, ("depth", "example"), long_name=told[name][0], units="nat",
                                         definition=told[name][1] + more, source="arXiv 2303.08112",
                                         coords=depth_coords(topology)) for name, value in scores.items()})
