"""Aligned τ: could another loop have done this loop's work, were it written in the right basis? Ours.

A low τ says *not exchangeable as it stands*: the same operation in a basis that turns from place to place has one too.
So each place k gets one map into a shared basis, and every exchange goes through these maps: content of k is written
at j, worked on by f_j, and what enters place j + 1 is written at k + 1. The maps are **tied**: the map of a place
serves it as input and as output. They are fitted on some examples and judged on others.

**Their freedom is bounded**, since a free map does the work itself. The clock is not fitted: maps that make all clocks
equal would turn an exchange of two loops with shared weights into the identity, which is no evidence. The content is
turned by an orthogonal map between the principal directions of the two places, so that nothing is written where the
other place never writes. Content beyond these directions is carried over as it stands.

The fit goes from pairs of places to all of them. For f_(k+1) on the content of place k, the best map of the output
given that of the input is a Procrustes solution, so that only the map from place 0 to place 1 has to be searched for
(from several starts, the least promising ones dropped on the way); the maps of later places follow one from another,
and at last all are refined together.

    frame = align(Trajectory.of(model, inputs, cycle), fit=torch.arange(32), groups=groups)
    found = exchange(model, inputs, cycle, frame=frame)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.exchange import Trajectory


@dataclass(frozen=True)
class AlignConfig:
    """How maps are fitted."""

    least_spread: float = 0.05      # principal directions kept: spread along them, relative to the largest
    starts: int = 150               # random starts of the search
    tries: int = 3                  # searches for the first pair of places, each with new random starts
    searched_directions: int = 24   # with more directions than these, none: a random turn is never near enough there
    good: float = 0.02              # residual at which the search may end
    keep: float = 0.2               # share of the starts that goes on from one round to the next
    rounds: int = 3                 # rounds of the search
    steps: int = 60                 # Adam steps of a round, and of the refinement of each place
    lr: float = 0.1
    joint_lr: float = 0.01
    joint_steps: int = 150          # Adam steps on all places together
    positions: int = 8192           # positions that one step of the search works on, over all starts, at most
    positions_each: int = 1024      # and those of one start, or of a step of the joint fit
    tolerance: float = 0.5          # residual that counts half in the joint fit: pairs beyond it stop pulling


@dataclass(frozen=True)
class Aligned:
    """One map per place into a shared basis; a frame for `probes.exchange`."""

    means: Float[Tensor, "place group d_model"]
    directions: Float[Tensor, "place d_model kept"]   # principal directions of the content
    spreads: Float[Tensor, "place"]
    turns: Float[Tensor, "place kept kept"]
    groups: Int[Tensor, "example pos"]

    def shared(self, state: Tensor, place: int, rows: Int[Tensor, "row"]) -> Float[Tensor, "row pos kept"]:
        """Content in the shared basis."""
        return self.content(state, place, rows) @ self.turns[place]

    def content(self, state: Tensor, place: int, rows: Int[Tensor, "row"]) -> Float[Tensor, "row pos kept"]:
        """Content along the principal directions of its place, in units of its scale."""
        centred = state - self.means[place][self.groups[rows]]
        return centred @ self.directions[place] / self.spreads[place]

    def carry(self, state: Tensor, source: int, to: int, rows: Int[Tensor, "row"]) -> Tensor:
        return self.carry_by(state, source, to, rows, self.turns[source] @ self.turns[to].T)

    def carry_by(self, state: Tensor, source: int, to: int, rows: Int[Tensor, "row"],
                 turn: Float[Tensor, "*start kept kept"]) -> Tensor:
        """Carry content by a given turn between two places; several turns give a leading axis."""
        group = self.groups[rows]
        centred = state - self.means[source][group]
        along = centred @ self.directions[source]
        beyond = centred - along @ self.directions[source].T
        beyond = beyond - beyond @ self.directions[to] @ self.directions[to].T
        turned = torch.einsum("npk,...kl->...npl", along / self.spreads[source], turn)
        return self.means[to][group] + (turned * self.spreads[to]) @ self.directions[to].T + beyond

    def carry_back(self, z: Tensor, k: int, j: int, rows: Int[Tensor, "row"]) -> Tensor:
        return self.carry(z, j + 1, k + 1, rows)


def align(run: Trajectory, *, fit: Int[Tensor, "row"], groups: Int[Tensor, "example pos"],
          places: Sequence[int] | None = None, config: AlignConfig | None = None, seed: int = 0) -> Aligned:
    """Fit the maps of ``places`` (adjacent ones; all by default) on the examples ``fit``."""
    config = config or AlignConfig()
    members = list(range(run.n_places)) if places is None else sorted(places)
    frame = untuned(run, fit=fit, groups=groups, config=config)
    if len(members) < 2:
        return frame
    generator = torch.Generator().manual_seed(seed)
    return _together(run, _chained(run, frame, members, fit, config, generator), members, fit, config, generator)


def untuned(run: Trajectory, *, fit: Int[Tensor, "row"], groups: Int[Tensor, "example pos"],
            config: AlignConfig) -> Aligned:
    """The frame before any fit: mean clocks, principal directions, and turns that change the state least."""
    n_groups = int(groups.max()) + 1
    label = groups[fit].flatten()
    means, spectra = [], []
    for state in run.states:
        flat = state[fit].flatten(0, 1)
        number = flat.new_zeros(n_groups).index_add_(0, label, torch.ones_like(flat[:, 0]))
        mean = flat.new_zeros(n_groups, flat.shape[1]).index_add_(0, label, flat) / number[:, None].clamp_min(1)
        means.append(torch.where(number[:, None] > 0, mean, flat.mean(0)))
        spectra.append(torch.linalg.svd((flat - means[-1][label]) / len(flat) ** 0.5, full_matrices=False))
    kept = max(1, *(int((s > config.least_spread * s[0]).sum()) for _, s, _ in spectra))
    directions = torch.stack([v[:kept].T for _, _, v in spectra])
    spreads = torch.stack([(s[:kept].square().mean()).sqrt().clamp_min(1e-6) for _, s, _ in spectra])
    turns = [torch.eye(kept)]
    for k in range(1, len(means)):
        turns.append(_nearest(directions[k].T @ directions[k - 1]) @ turns[-1])
    return Aligned(torch.stack(means), directions, spreads, torch.stack(turns), groups)


# ------------------------------------------------------------------------------ private

def _chained(run: Trajectory, frame: Aligned, members: Sequence[int], fit: Int[Tensor, "row"], config: AlignConfig,
             generator: torch.Generator) -> Aligned:
    """Maps of the places one after another: f_(k+1) is to do the work of f_k."""
    turns = list(frame.turns)
    small = frame.turns.shape[-1] <= config.searched_directions
    for k, j in pairwise(members):
        known = turns[k] @ turns[j].T
        n_random = config.starts if small and k == members[0] else 0
        starts = _starts(run, replace(frame, turns=torch.stack(turns)), k, j, fit, known, n_random, generator)
        best, back, residual = _search(run, frame, k, j, starts, fit, config, generator)
        for _ in range(config.tries - 1 if n_random else 0):
            if residual < config.good:
                break
            more = _starts(run, frame, k, j, fit, best, n_random, generator)
            best, back, residual = _search(run, frame, k, j, more, fit, config, generator)
        turns[j] = best.T @ turns[k]                    # content of k turned by `best` is content of j
        if j == k + 1:
            turns[j + 1] = back @ turns[k + 1]          # what f_j made, at j + 1, turned by `back` is that of k + 1
    return replace(frame, turns=torch.stack(turns))


def _starts(run: Trajectory, frame: Aligned, k: int, j: int, fit: Int[Tensor, "row"], known: Tensor,
            n_random: int, generator: torch.Generator) -> Float[Tensor, "start kept kept"]:
    """Turns from which the search sets out: the one known so far, Procrustes solutions between whitened contents (of
    each example and position, and of each position's mean), both also mirrored along what is least alike, and random
    ones."""
    one, other = (frame.content(run.states[p][fit], p, fit) for p in (k, j))
    white = [_whitening(content.flatten(0, 1)) for content in (one, other)]
    starts = [known]
    for a, b in ((one.flatten(0, 1), other.flatten(0, 1)), (one.mean(0), other.mean(0))):
        u, _, v = torch.linalg.svd(white[0] @ a.T @ b @ white[1])
        mirrored = u.clone()
        mirrored[:, -1] *= -1
        starts += [u @ v, mirrored @ v]
    random = torch.randn(n_random, *known.shape, generator=generator)
    return torch.cat([torch.stack(starts), torch.linalg.qr(random).Q])


def _whitening(content: Float[Tensor, "point kept"]) -> Float[Tensor, "kept kept"]:
    """The symmetric inverse root of the second moments (a direction without content keeps its own)."""
    values, vectors = torch.linalg.eigh(content.T @ content / len(content))
    return (vectors * values.clamp_min(1e-4).rsqrt()) @ vectors.T


def _search(run: Trajectory, frame: Aligned, k: int, j: int, starts: Float[Tensor, "start kept kept"],
            fit: Int[Tensor, "row"], config: AlignConfig, generator: torch.Generator) -> tuple[Tensor, Tensor, float]:
    """The turn k → j under which f_j comes nearest to f_k, the turn j + 1 → k + 1 that goes with it, what is left."""
    pair = _Pair(run, frame, k, j, fit, config, generator)
    current, residual = pair.ranked(starts)
    current = current[:max(2, config.positions // (16 * frame.groups.shape[1]))]
    for _ in range(config.rounds):
        if residual < config.good:
            break
        current, residual = pair.ranked(torch.cat([current[:1], pair.descended(current, residual)]))
        current = current[:max(1, int(len(current) * config.keep))]
    for _ in range(config.rounds):
        if residual < config.good or current.shape[-1] > config.searched_directions:
            break
        moved = pair.mirrored(current[:1])
        current, reached = pair.ranked(torch.cat([moved, pair.descended(moved, residual)]))
        if reached > 0.99 * residual:
            break
        residual = reached
    with torch.no_grad():
        return current[0], _pair(run, frame, k, j, current[:1], fit)[1][0], residual


@dataclass(frozen=True)
class _Pair:
    """The search for one turn: f_j on the content of place k, in the place of f_k."""

    run: Trajectory
    frame: Aligned
    k: int
    j: int
    fit: Int[Tensor, "row"]
    config: AlignConfig
    generator: torch.Generator

    def some(self, n_turns: int) -> Int[Tensor, "row"]:
        """As many of the examples, in random order, as one step can work on."""
        n_each = max(8, min(self.config.positions // n_turns, self.config.positions_each) // self.frame.groups.shape[1])
        return self.fit[torch.randperm(len(self.fit), generator=self.generator)[:n_each]]

    @torch.no_grad()
    def residuals(self, turns: Float[Tensor, "start kept kept"], rows: Int[Tensor, "row"]) -> Float[Tensor, "start"]:
        size = max(1, self.config.positions // (self.frame.groups.shape[1] * len(rows)))
        return torch.cat([_pair(self.run, self.frame, self.k, self.j, part, rows)[0] for part in turns.split(size)])

    def ranked(self, turns: Float[Tensor, "start kept kept"]) -> tuple[Float[Tensor, "start kept kept"], float]:
        """The turns, best first, and the residual of the best on all examples."""
        residual = self.residuals(turns, self.fit)
        return turns[residual.argsort()], float(residual.min())

    def descended(self, turns: Float[Tensor, "start kept kept"], residual: float) -> Float[Tensor, "start kept kept"]:
        """A round of Adam steps from each turn; smaller ones where the best is near its goal."""
        lr = self.config.lr * min(1.0, max(residual, 0.05))
        skew = torch.zeros_like(turns).requires_grad_()
        optimizer = torch.optim.Adam([skew], lr=lr)
        for step in range(self.config.steps):
            optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - step / self.config.steps))
            with torch.enable_grad():
                loss = _pair(self.run, self.frame, self.k, self.j, turns @ torch.linalg.matrix_exp(skew - skew.mT),
                             self.some(len(turns)))[0].sum()
            if not _step(optimizer, loss, skew):
                break
        with torch.no_grad():
            return turns @ torch.linalg.matrix_exp(skew - skew.mT)

    @torch.no_grad()
    def mirrored(self, turn: Float[Tensor, "1 kept kept"]) -> Float[Tensor, "1 kept kept"]:
        """The turn after mirrorings that exchange two independent components of the content, or the sign of one, each
        the best of all, as long as they help: what no path of small steps does."""
        rows = self.some(8)
        parts = independent_components(self.frame.content(self.run.states[self.k][self.fit], self.k, self.fit)
                                       .flatten(0, 1), self.generator)
        first, second = torch.triu_indices(len(parts), len(parts), 1)
        along = torch.cat([parts, *((parts[first] + sign * parts[second]) / 2 ** 0.5 for sign in (1, -1))])
        mirrors = torch.eye(turn.shape[-1]) - 2 * along[:, :, None] * along[:, None]
        best = float(self.residuals(turn, rows))
        for _ in range(4 * len(parts)):
            candidates = mirrors @ turn
            residual = self.residuals(candidates, rows)
            if float(residual.min()) > 0.99 * best:
                break
            turn, best = candidates[residual.argmin()][None], float(residual.min())
        return turn


def independent_components(content: Float[Tensor, "point kept"], generator: torch.Generator,
                           ) -> Float[Tensor, "component kept"]:
    """Orthogonal directions along which the content is least Gaussian (FastICA with the cube, Hyvärinen 1999)."""
    white = content @ _whitening(content)
    parts = torch.linalg.qr(torch.randn(content.shape[1], content.shape[1], generator=generator)).Q
    for _ in range(100):
        along = white @ parts.T
        parts = _nearest((along ** 3).T @ white / len(white) - 3 * parts)
    return parts


def _pair(run: Trajectory, frame: Aligned, k: int, j: int, turns: Float[Tensor, "start kept kept"],
          rows: Int[Tensor, "row"]) -> tuple[Float[Tensor, "start"], Float[Tensor, "start kept kept"]]:
    """Residual of f_j in the place of f_k for each turn of its input, and the best turn of its output."""
    carried = frame.carry_by(run.states[k][rows], k, j, rows, turns)
    made = run.operate(j, carried.flatten(0, 1), rows.repeat(len(turns))).unflatten(0, (len(turns), len(rows)))
    content = torch.stack([frame.content(z, j + 1, rows) for z in made]).flatten(1, 2)
    wanted = frame.content(run.states[k + 1][rows], k + 1, rows).flatten(0, 1)
    with torch.no_grad():
        back = _nearest(content.mT @ wanted)
    return (content @ back - wanted).square().mean((1, 2)), back


def _step(optimizer: torch.optim.Optimizer, loss: Float[Tensor, ""], free: Float[Tensor, "..."]) -> bool:
    """One step on ``free`` alone, the model's own gradients untouched; False where the loss has no finite gradient
    (a model that runs without gradients, or rounds): then only starts and mirrorings are compared."""
    if not loss.requires_grad:
        return False
    gradient, = torch.autograd.grad(loss, [free], allow_unused=True)
    if gradient is None or not bool(torch.isfinite(gradient).all()):
        return False
    free.grad = gradient
    optimizer.step()
    return True


def _nearest(matrix: Float[Tensor, "*start kept kept"]) -> Float[Tensor, "*start kept kept"]:
    """The orthogonal matrix that is nearest (Schönemann 1966)."""
    u, _, v = torch.linalg.svd(matrix)
    return u @ v


def _together(run: Trajectory, frame: Aligned, members: Sequence[int], fit: Int[Tensor, "row"], config: AlignConfig,
              generator: torch.Generator) -> Aligned:
    """Refine the maps of all places on all exchanges; those that cannot succeed stop pulling."""
    skew = torch.zeros_like(frame.turns).requires_grad_()
    optimizer = torch.optim.Adam([skew], lr=config.joint_lr)
    n_each = max(8, config.positions_each // (frame.groups.shape[1] * (len(members) - 1)))

    def current() -> Aligned:
        return replace(frame, turns=frame.turns @ torch.linalg.matrix_exp(skew - skew.mT))

    def loss(now: Aligned, j: int, rows: Int[Tensor, "row"]) -> Float[Tensor, ""]:
        sources = [k for k in members if k != j]
        carried = torch.cat([now.carry(run.states[k][rows], k, j, rows) for k in sources])
        made = run.operate(j, carried, rows.repeat(len(sources))).chunk(len(sources))
        residual = torch.stack([(now.shared(z, j + 1, rows) - now.shared(run.states[k + 1][rows], k + 1, rows))
                                .square().mean() for k, z in zip(sources, made, strict=True)])
        return (residual / (residual + config.tolerance)).mean()

    for step in range(config.joint_steps):
        optimizer.param_groups[0]["lr"] = config.joint_lr * min(1.0, 2 * (1 - step / config.joint_steps))
        some = fit[torch.randperm(len(fit), generator=generator)[:n_each]]
        with torch.enable_grad():
            value = loss(current(), members[step % len(members)], some)
        if not _step(optimizer, value, skew):
            break
    with torch.no_grad():
        refined = current()
        before, after = (sum(float(loss(one, j, fit)) for j in members) for one in (frame, refined))
    return refined if after < before else frame
