"""One loop as a map from state to state: its Jacobian's norm and spectral radius, and Lyapunov exponents of the run.

    found = jacobian_spectrum(model, noised, n_loops=8)         # norm, radius [loop, example]
    lyapunov(model, noised, n_loops=8, n_exponents=2)           # exponent [exponent, example], nat per loop

A state is all positions of an example together. The norm is how much one loop can stretch a small difference at most;
the radius is what one is multiplied by in the end, per loop, when the same linear map is repeated. A radius below 1
beside a norm above 1 is a map that stretches first and contracts later. A loop that adds one constant vector has norm
and radius 1, and its exponent is 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hooks.contract import Context, Inputs, Levels, LoopedModel, Unavailable
from probes.measurement import check_run, measurement

SPECTRUM = "power iteration on JᵀJ (norm) and on J (radius), Golub & Van Loan 2013, sections 7.3 and 8.2"
LYAPUNOV = "singular values of the run's Jacobian, Oseledets 1968; Eckmann & Ruelle 1985"


def jacobian_spectrum(model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, t: Levels = None,
                      loops: Sequence[int] | None = None, at: Bool[Tensor, "batch pos"] | None = None,
                      n_iter: int = 60, seed: int = 0) -> xr.Dataset:
    """Norm and spectral radius of ∂X_(k+1)/∂X_k, where the run passes; over (loop, example).

    ``norm`` is the largest singular value, ``radius`` the largest modulus of an eigenvalue, which exceeds no norm;
    both by ``n_iter`` steps of power iteration. ``norm_change`` and ``radius_change`` are the relative changes over
    the last quarter of them: where they are large, ask for more. ``loops`` are those wanted (all by default); ``at``
    restricts differences, and what is seen of them afterwards, to some positions.

    The radius is of one loop's map, applied to itself for ever. It bounds what the run does only where the run stays
    at a fixed point; `lyapunov` follows the run.

    Raises Unavailable where the model cannot be differentiated, ValueError for loops that there are not, fewer than 8
    steps, and states that are not finite.
    """
    if n_iter < 8:
        raise ValueError(f"n_iter must be at least 8, to see whether anything still changes; not {n_iter}.")
    found: dict[str, list[Tensor]] = {name: [] for name in ("norm", "radius", "norm_change", "radius_change")}
    with model.exclusive():
        states, context = _run(model, inputs, n_loops, t)
        ends = context.topology.loop_depths()
        wanted = list(range(len(ends))) if loops is None else list(loops)
        if not wanted or not set(wanted) <= set(range(len(ends))):
            raise ValueError(f"loops must be some of 0..{len(ends) - 1}, not {wanted}.")
        for k in wanted:
            where = states[0].new_ones(states[0].shape[:2]) if at is None else at.to(states[0])
            one = _Map(model, context, ends[k][0], ends[k][-1] + 1, states[ends[k][0]], where)
            v = w = _unit(_start(states[0], seed) * where[..., None])[0]
            norms, growth = [], []
            for _ in range(n_iter):
                forward = one.jvp(v)
                norms.append(_size(forward))
                v, _ = _unit(one.vjp(forward))
                w, grown = _unit(one.jvp(w))
                growth.append(grown.clamp_min(1e-30).log())
            norm, rate = torch.stack(norms), torch.stack(growth)
            half, quarter = n_iter // 2, n_iter // 4
            radius = rate[half:].mean(0).exp()
            for name, value in (("norm", norm[-1]), ("radius", radius),
                                ("norm_change", (norm[-1] - norm[-quarter]).abs() / norm[-1].clamp_min(1e-30)),
                                ("radius_change", (rate[half:-quarter].mean(0) - rate[-quarter:].mean(0)).abs())):
                found[name].append(value)
    described = {"norm": ("norm of a loop's Jacobian", "largest singular value of ∂X_(k+1)/∂X_k"),
                 "radius": ("spectral radius of a loop's Jacobian", "largest |eigenvalue| of ∂X_(k+1)/∂X_k"),
                 "norm_change": ("relative change of the norm", "over the last quarter of the power iteration"),
                 "radius_change": ("relative change of the radius", "between the last two quarters of the iteration")}
    return xr.Dataset({name: measurement(torch.stack(found[name]), ("loop", "example"), long_name=long_name, units="1",
                                         definition=definition, source=SPECTRUM, coords={"loop": wanted})
                       for name, (long_name, definition) in described.items()},
                      attrs={"n_loops": context.topology.n_loops, "n_iter": n_iter})


def lyapunov(model: LoopedModel, inputs: Inputs, *, n_loops: int | None = None, t: Levels = None, start: int = 0,
             n_exponents: int = 1, at: Bool[Tensor, "batch pos"] | None = None, n_iter: int = 30,
             seed: int = 0) -> xr.Dataset:
    """Finite-time Lyapunov exponents of a run from loop ``start`` to the last, over (exponent, example), largest first.

    λ_i = log σ_i / K, σ_i the singular values of ∂X_K/∂X_0 over K loops, in nat per loop: above 0, small differences
    grow; below, they shrink. ``change`` is how much λ_i still changed over the last quarter of ``n_iter`` steps of
    subspace iteration. They are of finite time: a difference that grows first and shrinks later has the exponent of
    the balance. ``at`` as in `jacobian_spectrum`.

    Raises as `jacobian_spectrum` does, and ValueError for no exponent, or more than the state has dimensions.
    """
    with model.exclusive():
        states, context = _run(model, inputs, n_loops, t)
        ends = context.topology.loop_depths()
        if not 0 <= start < len(ends):
            raise ValueError(f"start must be one of the loops 0..{len(ends) - 1}, not {start}.")
        n, pos, width = states[0].shape
        if not 1 <= n_exponents <= pos * width:
            raise ValueError(f"n_exponents must be between 1 and the state's {pos * width} dimensions, "
                             f"not {n_exponents}.")
        first, stop = ends[start][0], ends[-1][-1] + 1
        rows = torch.arange(n, device=states[0].device).repeat(n_exponents)
        where = states[0].new_ones(n, pos) if at is None else at.to(states[0])
        whole = _Map(model, context.rows(rows), first, stop, states[first][rows], where[rows])
        v = torch.cat([_start(states[0], seed + i) * where[..., None] for i in range(n_exponents)])
        seen = []
        for _ in range(n_iter):
            image = whole.jvp(_orthonormal(v, n))
            flat = image.reshape(n_exponents, n, -1).permute(1, 2, 0)
            seen.append(torch.linalg.svdvals(flat.double()).clamp_min(1e-300).log().T / (len(ends) - start))
            v = whole.vjp(image)
    change = (seen[-1] - seen[-max(1, n_iter // 4)]).abs()
    definition = "log σ_i(∂X_K/∂X_0) / K, K loops, the state being all positions together"
    return xr.Dataset({name: measurement(value, ("exponent", "example"), long_name=long_name, units="nat per loop",
                                         definition=definition + more, source=LYAPUNOV)
                       for name, value, long_name, more in (
                           ("exponent", seen[-1], "finite-time Lyapunov exponent", ""),
                           ("change", change, "change of the exponent", ", over the last quarter of the iteration"))},
                      attrs={"n_loops": context.topology.n_loops, "start": start, "n_iter": n_iter})


# -------------------------------------------------------------------------------------- private

@torch.no_grad()
def _run(model: LoopedModel, inputs: Inputs, n_loops: int | None, t: Levels) -> tuple[tuple[Tensor, ...], Context]:
    run = model.run(inputs, n_loops, t=t)
    check_run(run, answer=False)
    states = run.states
    if states[0].dtype not in (torch.float, torch.double):
        raise Unavailable(f"{model.name} runs in {str(states[0].dtype).removeprefix('torch.')}, whose rounding is "
                          "larger than the differences that a Jacobian is about: convert it with .float() first.")
    return states, run.context


class _Map:
    """The layers from one depth to another, around one state: products with their Jacobian and its transpose.

    Differences at positions where ``where`` is 0 are left out, before and after.
    """

    def __init__(self, model: LoopedModel, context: Context, start: int, stop: int, state: Tensor, where: Tensor):
        self.model, self.context, self.start, self.stop = model, context, start, stop
        self.state, self.where = state.detach(), where[..., None]
        with torch.enable_grad(), _differentiable(model):
            self.leaf = self.state.clone().requires_grad_()
            self.end = model.walk(self.leaf, context, start, stop)
            if not self.end.requires_grad or torch.autograd.grad(self.end.sum(), self.leaf, retain_graph=True,
                                                                 allow_unused=True)[0] is None:
                raise Unavailable(f"{model.name} runs its layers without gradients, under torch.no_grad() in its own "
                                  "code: no Jacobian can be had. What needs none is not affected: contraction, "
                                  "settling times, the line search.")

    def jvp(self, v: Tensor) -> Tensor:
        """J v, by forward-mode differentiation."""
        with torch.no_grad(), _differentiable(self.model), forward_ad.dual_level():
            end = self.model.walk(forward_ad.make_dual(self.state, v * self.where), self.context, self.start, self.stop)
            tangent = forward_ad.unpack_dual(end).tangent
        return torch.zeros_like(v) if tangent is None else tangent.detach() * self.where

    def vjp(self, w: Tensor) -> Tensor:
        """Jᵀ w, by reverse-mode differentiation."""
        back, = torch.autograd.grad(self.end, self.leaf, w * self.where, retain_graph=True)
        return back * self.where


@contextmanager
def _differentiable(model: LoopedModel) -> Iterator[None]:
    """Attention as plain products, of which both derivatives are known; a clear error for other operations."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.jit\.script", DeprecationWarning)   # torch's own forward rules
            yield
    except NotImplementedError as error:
        raise Unavailable(f"{model.name} runs an operation without forward derivatives: {error}") from error
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _start(state: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(state.shape, generator=generator, dtype=torch.float).to(state)


def _size(v: Float[Tensor, "example pos d_model"]) -> Float[Tensor, "example"]:
    return v.flatten(1).norm(dim=1)


def _unit(v: Float[Tensor, "example pos d_model"]) -> tuple[Tensor, Float[Tensor, "example"]]:
    size = _size(v)
    return v / size.clamp_min(1e-30)[:, None, None], size


def _orthonormal(v: Float[Tensor, "row pos d_model"], n: int) -> Tensor:
    """Vectors of one example at right angles; rows are vector after vector, each of ``n`` examples."""
    flat = v.reshape(-1, n, v[0].numel()).permute(1, 2, 0)
    q: Any = torch.linalg.qr(flat.double())[0].to(v)
    return q.permute(2, 0, 1).reshape(v.shape)
