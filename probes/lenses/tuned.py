"""The tuned lens (2303.08112) per layer and loop: an affine map of the state, fitted so that it reads the final answer.

X + A X + b goes through the model's own final norm and unembedding. A and b start at 0, which is the logit lens. Each
depth has its own, or with ``shared=True`` each layer has one for all its loops: how much of a loop's difference a
readout of its own explains is the difference of the two held-out divergences.

    lens = TunedLens.fit(model, noised, n_loops=4)
    over_examples(lens.held_out.kl)                           # [depth], nats, on examples that were kept apart
    read_lens(model, noised, n_loops=4, kind=lens, targets=tokens)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from hooks.contract import Context, Forward, Inputs, Levels, LoopedModel
from hooks.topology import Topology
from probes.lenses.base import LogitLens, divergence
from probes.lenses.fitted import Fit, FittedLens, weights_hash
from probes.measurement import mean_over_positions


class TunedLens(FittedLens):
    """logits = unembed(ln_final(X + A X + b)), with A and b of the depth, or of the layer."""

    kind = "tuned"
    definition = "logits = unembed(ln_final(X + A X + b)), A and b fitted on KL(final ‖ lens)"
    source = "arXiv 2303.08112"

    @classmethod
    def fit(cls, model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, t: Levels = None,
            shared: bool = False, scored: Bool[Tensor, "batch pos"] | None = None, seed: int = 0, max_epochs: int = 100,
            patience: int = 5, lr: float = 2e-3, rows: int = 32, progress: bool | None = None) -> TunedLens:
        """Fit on 70% of the examples, stop on 15%, judge on 15%; a few seconds per thousand positions at width 128.

        Adam minimises KL(final ‖ lens) [nat] at the scored positions, for all depths at once. Each map is kept as it
        was at its own best epoch; fitting ends when none has improved for ``patience`` epochs, or at ``max_epochs``.
        ``rows`` examples are held at a time. ``progress`` shows a bar (by default in a terminal). The same seed gives
        the same lens on the same machine.

        Raises ValueError for fewer examples than three parts need, and states that are not finite.
        """
        with model.exclusive():
            fit = Fit(model, inputs, n_loops, t, scored, seed, rows)
            topology = fit.topology
            index = translators(topology, shared)
            n, width, device = int(index.max()) + 1, _width(fit), next(model.module.parameters()).device
            a = torch.zeros(n, width, width, device=device, requires_grad=True)
            b = torch.zeros(n, width, device=device, requires_grad=True)
            optimizer = torch.optim.Adam([a, b], lr=lr)
            best_a, best_b = torch.zeros_like(a), torch.zeros_like(b)
            best, waited = _stopping(fit, a, b, index), 0
            generator = torch.Generator().manual_seed(seed)
            bar = tqdm(range(max_epochs), desc="tuned lens", disable=None if progress is None else not progress)
            for _ in bar:
                order = fit.fitted[torch.randperm(len(fit.fitted), generator=generator)]
                for chosen, run in fit.passes(order):
                    loss = torch.stack(_losses(fit, run, a, b, index, fit.scored[chosen])).sum()
                    gradients = torch.autograd.grad(loss, (a, b))
                    a.grad, b.grad = gradients
                    optimizer.step()
                now = _stopping(fit, a, b, index)
                better = now < best - 1e-5
                best = torch.where(better, now, best)
                with torch.no_grad():
                    best_a[better], best_b[better] = a[better], b[better]
                waited = 0 if bool(better.any()) else waited + 1
                bar.set_postfix(nats=f"{float(best.mean()):.4f}")
                if waited >= patience:
                    break
            bar.close()
            lens = cls({"A": best_a, "b": best_b}, topology=topology, model_hash=weights_hash(model),
                       held_out=fit.no_scores(), options={"shared": shared, "seed": seed})
            lens.held_out = fit.judge(lens, LogitLens())
        return lens

    def logits(self, model: LoopedModel, state: Float[Tensor, "row pos d_model"], context: Context,
               depth: Int[Tensor, "row"]) -> Float[Tensor, "row pos vocab"]:
        which = translators(self.topology, bool(self.options["shared"]))[depth.cpu()]
        a, b = (self.weights[name][which].to(state) for name in ("A", "b"))
        return model.read(state + state @ a.mT + b[:, None], context)


def translators(topology: Topology, shared: bool) -> Int[Tensor, "depth"]:
    """Which of the maps reads each depth: its own, or that of its layer."""
    layers = torch.tensor([layer for layer, _ in topology.unrolled()])
    return layers if shared else torch.arange(topology.depth)


def _width(fit: Fit) -> int:
    return int(next(fit.passes(fit.fitted[:1]))[1].states[0].shape[-1])


def _losses(fit: Fit, run: Forward, a: Tensor, b: Tensor, index: Int[Tensor, "depth"],
            scored: Bool[Tensor, "row pos"]) -> list[Float[Tensor, ""]]:
    """KL [nat] at each depth but the last, whose answer is the final one: a mean over the scored positions."""
    log_q, found = run.logits.float().log_softmax(-1), []
    where = scored.to(log_q.device)
    for depth, which in enumerate(index[:-1].tolist()):
        state = run.states[depth + 1]
        moved = state + state @ a[which].T.to(state) + b[which].to(state)
        log_p = fit.model.read(moved, run.context).float().log_softmax(-1)
        found.append(mean_over_positions(divergence(log_q, log_p), where).nanmean())
    return found


@torch.no_grad()
def _stopping(fit: Fit, a: Tensor, b: Tensor, index: Int[Tensor, "depth"]) -> Float[Tensor, "translator"]:
    """KL [nat] of each map on the examples that decide when to stop, a mean over the depths that it reads."""
    total, n = torch.zeros(len(a), device=a.device), torch.zeros(len(a), device=a.device)
    for chosen, run in fit.passes(fit.stopping):
        for which, loss in zip(index.tolist(), _losses(fit, run, a, b, index, fit.scored[chosen]), strict=False):
            total[which] += loss * len(chosen)
            n[which] += len(chosen)
    return total / n.clamp_min(1)
