"""What linear probes read: states at chosen positions, site by site, copied only when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from hooks.contract import Inputs, Levels, LoopedModel
from hooks.recording import Recording
from hooks.topology import Topology


class Features(Sequence[Tensor]):
    """Features [point, d_model] of each depth, at the positions of a mask [batch, pos], in the mask's order.

    With ``earlier`` sites, what has changed since them. A depth's features are a copy, made anew at each access, so
    that the features of all depths never lie in memory beside the recording.
    """

    def __init__(self, recording: Recording, sites: Sequence[str], where: Bool[Tensor, "batch pos"],
                 earlier: Sequence[str] | None = None):
        self.recording, self.sites, self.where, self.earlier = recording, list(sites), where, earlier

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        x = self._of(self.sites[index])
        return x if self.earlier is None else x - self._of(self.earlier[index])

    @property
    def example(self) -> Int[Tensor, "point"]:
        """Whose position each point is."""
        return self.where.nonzero()[:, 0]

    def at(self, where: Bool[Tensor, "batch pos"]) -> Features:
        """The same sites at other positions."""
        return Features(self.recording, self.sites, where, self.earlier)

    def sides(self, where: Bool[Tensor, "batch pos"], judged: Bool[Tensor, "batch"],
              ) -> tuple[Features, Features, Float[np.ndarray, "example"]]:
        """Features to fit on, those of the judged examples, and the number of points of each judged example.

        Raises ValueError for a mask of another shape and for a side without a point.
        """
        if where.shape != self.where.shape:
            raise ValueError(f"labels must be [batch, pos] = {tuple(self.where.shape)}, not {tuple(where.shape)}.")
        fit, test = where & ~judged[:, None], where & judged[:, None]
        if not fit.any():
            raise ValueError("no labelled example is in the training set.")
        if not test.any():
            raise ValueError("no held-out example has a label here: give more examples, or a larger test_fraction.")
        return self.at(fit), self.at(test), where[judged].sum(1).double().numpy()

    def _of(self, site: str) -> Float[Tensor, "point d_model"]:
        state = self.recording[site]
        x = state[self.where.to(state.device)]
        return x if x.dtype in (torch.float, torch.double) else x.float()


@torch.no_grad()
def site_features(model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, t: Levels = None,
                  hook: str = "hook_resid_post", difference: bool = False) -> tuple[Features, list[int], Topology]:
    """Features at every position, the depths that they belong to, and the topology of the run.

    With ``difference``, a feature is the state minus the state after the same layer one loop earlier (2607.18553), at
    the depths of loops from 1 on. Raises SiteError for a hook that blocks do not have, ValueError for differences of
    fewer than two loops.
    """
    topology = model.topology(n_loops)
    sites = [topology.site_at(depth, hook) for depth in range(topology.depth)]
    depths, earlier = list(range(topology.depth)), None
    if difference:
        loops = topology.loop_depths()
        before = {now: then for one, other in pairwise(loops)
                  for then, now in zip(one, other, strict=True)}
        if not before:
            raise ValueError(f"differences of loops need two loops; {model.name} runs {len(loops)} here.")
        depths, earlier = list(before), [sites[depth] for depth in before.values()]
    _, recording = model.run_with_cache(inputs, n_loops, names_filter=sites, t=t)
    asked = [sites[depth] for depth in depths]
    everywhere = torch.ones(recording[asked[0]].shape[:2], dtype=torch.bool)
    return Features(recording, asked, everywhere, earlier), depths, topology


def examples_sums(values: Shaped[np.ndarray, "site point"], where: Bool[Tensor, "example pos"],
                  ) -> Float[np.ndarray, "example site"]:
    """Sums over the points of each example; points are the positions of a mask, in its order."""
    total = torch.zeros(len(where), len(values), dtype=torch.double)
    points = torch.from_numpy(np.ascontiguousarray(values.T)).double()
    return total.index_add_(0, where.nonzero()[:, 0], points).numpy()
