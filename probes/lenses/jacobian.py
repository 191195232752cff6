"""The Jacobian lens (Gurnee et al. 2026) per layer and loop: states carried forward by the mean Jacobian, then read.

J is the mean over a corpus of ∂X_final[pos] / ∂X[pos], at scored positions: what the rest of the network does to a
small change of the state at its own position, to first order. The lens reads unembed(ln_final(J X)). Towards the
``exit`` of its own loop, J is ∂X_exit / ∂X and the coda reads: the loop's own work is linearised, what follows is run.

    lens = JacobianLens.fit(model, noised, n_loops=4)
    read_lens(model, noised, n_loops=4, kind=lens, targets=tokens)
    JacobianLens.fit(model, noised, n_loops=4, towards="exit").weights["J"]       # [depth, d_model, d_model]
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from hooks.contract import Context, Inputs, Levels, LoopedModel
from hooks.topology import Topology
from probes.batching import in_chunks, select_examples
from probes.gradients import differentiable_states
from probes.lenses.base import CodaLens, LogitLens, loops_end
from probes.lenses.fitted import Fit, FittedLens, weights_hash

Towards = Literal["final", "exit"]


class JacobianLens(FittedLens):
    """logits = unembed(ln_final(J X)), or coda(J X) towards the exit of the state's own loop."""

    kind = "jacobian"
    definition = "logits = unembed(ln_final(J X)), J = mean of ∂X_final[pos] / ∂X[pos] over scored positions"
    source = "Gurnee et al. 2026, Jacobian lens; per loop: arXiv 2609.01924"

    @classmethod
    def fit(cls, model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, t: Levels = None,
            towards: Towards = "final", scored: Bool[Tensor, "batch pos"] | None = None, seed: int = 0,
            rows: int = 32, progress: bool | None = None) -> JacobianLens:
        """Average the Jacobians at one scored position, chosen by chance, of each of 85% of the examples; the rest
        judge.

        One backward pass per width and ``rows`` examples serves every depth. Exact at each position; what is averaged
        are positions. Raises ValueError for fewer examples than the parts need, an unknown ``towards``, and states
        that are not finite; `hooks.Unavailable` where the model's own code runs layers without gradients.
        """
        if towards not in get_args(Towards):
            raise ValueError(f"towards must be one of {', '.join(get_args(Towards))}, not {towards!r}.")
        with model.exclusive():
            fit = Fit(model, inputs, n_loops, t, scored, seed, rows)
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.cat([fit.fitted, fit.stopping])
            pos = torch.multinomial(fit.scored[chosen].double(), 1, generator=generator)[:, 0]
            total = None
            some_inputs, some_t = select_examples(model, inputs, t, chosen)
            bar = tqdm(total=len(chosen), desc="Jacobian lens", disable=None if progress is None else not progress)
            for part, part_t, index in in_chunks(model, some_inputs, some_t, size=rows):
                added = _jacobians(model, part, n_loops, part_t, pos[index], towards)
                total = added if total is None else total + added
                bar.update(len(index))
            bar.close()
            assert total is not None
            lens = cls({"J": total / len(chosen)}, topology=fit.topology, model_hash=weights_hash(model),
                       held_out=fit.no_scores(), options={"towards": towards, "seed": seed})
            lens.held_out = fit.judge(lens, LogitLens() if towards == "final" else CodaLens())
        return lens

    def logits(self, model: LoopedModel, state: Float[Tensor, "row pos d_model"], context: Context,
               depth: Int[Tensor, "row"]) -> Float[Tensor, "row pos vocab"]:
        carried = state @ self.weights["J"][depth.cpu()].to(state).mT
        if self.options["towards"] == "final":
            return model.read(carried, context)
        exits = torch.arange(self.topology.depth)
        for target, sources in _targets(self.topology, "exit"):
            exits[sources] = target
        return CodaLens().logits(model, carried, context, exits[depth.cpu()])

    def own_from(self, topology: Topology) -> int:
        return topology.depth - 1 if self.options["towards"] == "final" else loops_end(topology) - 1


def _targets(topology: Topology, towards: Towards) -> list[tuple[int, list[int]]]:
    """(the depth whose state is differentiated, the depths before it that are carried to it)."""
    depth = topology.depth
    if towards == "final":
        return [(depth - 1, list(range(depth - 1)))]
    parts = [list(range(topology.n_head)), *map(list, topology.loop_depths()), list(range(loops_end(topology), depth))]
    return [(part[-1], part[:-1]) for part in parts if part]


def _jacobians(model: LoopedModel, inputs: Inputs, n_loops: int | None, t: Levels, pos: Int[Tensor, "row"],
               towards: Towards) -> Float[Tensor, "depth d_out d_in"]:
    """Sum over the examples of the Jacobian at their positions; the identity at the states carried to."""
    states, context = differentiable_states(model, inputs, n_loops, t=t)
    kept = states[1:]
    n, _, width = states[0].shape
    every, pos = torch.arange(n, device=states[0].device), pos.to(states[0].device)
    found = n * torch.eye(width, device=states[0].device).repeat(len(kept), 1, 1)
    for target, sources in _targets(context.topology, towards):
        for out in range(width if sources else 0):
            gradients = torch.autograd.grad(kept[target][every, pos, out].sum(), [kept[s] for s in sources],
                                            retain_graph=True)
            for source, gradient in zip(sources, gradients, strict=True):
                found[source, out] = gradient[every, pos].sum(0).float()
    return found.detach()
