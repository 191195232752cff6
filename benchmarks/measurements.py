"""What measurements cost beside the peers: probes at all sites, causal scans, lens grids, recording of every site.

    lines = measure(SMALL, rounds=3)                          # Comparison, each with its target

Each pair gives the same numbers, which is checked before it is timed: accuracies, effects, lens read-outs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.memory import resident_mb
from benchmarks.plain import PlainLoopMDM
from benchmarks.speed import Comparison, Size, build
from benchmarks.timing import Estimate, alternate, compare
from probes import LogisticProbe, causal_scan, probe_latent, read_lens
from probes.batching import derangement
from probes.causal import nll_of

CLASSES = 6
EQUAL = 0.01
"""Difference of held-out accuracies within which two probes are equal, or two points where those are more."""


def measure(size: Size, *, rounds: int) -> list[Comparison]:
    """The speed targets on one model. AssertionError where two contenders do not measure the same.

    Sharing what precedes an edit saves (D + 1) ÷ 2 of D layers, about half; what a scan gains beyond that is
    the batching of edits, which shows where a forward is small. So the scan is timed on two examples, too.
    """
    two = replace(size, batch=2)
    return [Comparison(size.name, what, compare(alternate(pair, rounds=rounds, warm_up=0), "ours", "peer"), target)
            for what, pair, target in (
                ("logistic probes at all sites ÷ a loop of scikit-learn", probes(size), 1 / 20),
                ("causal scan of every (loop, layer) ÷ one forward per edit", scans(size), 1 / 2.5),
                ("the same on 2 examples", scans(two), 1 / 2.5),
                ("logit-lens grid ÷ TransformerLens' logit_lens", lenses(size), 1.0),
                ("recording every site ÷ TorchLens' record", recordings(size), 1 / 10))]


def probes(size: Size) -> dict[str, Callable[[], Any]]:
    """A logistic probe of the token's class at every depth, on the same states and with the same penalty."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model, _ = build(size)
    tokens = torch.randint(0, 64, (8 * size.batch, size.pos), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = [state.reshape(-1, size.d_model) for state in model.run(tokens, size.n_loops).states[1:]]
    labels = (tokens % CLASSES).flatten()
    fitted, judged = slice(0, len(labels) // 2), slice(len(labels) // 2, None)

    def ours() -> list[float]:
        found = LogisticProbe(C=1.0).fit_sites([state[fitted] for state in states], labels[fitted])
        return [float((torch.as_tensor(found.answers(i, state[judged])).flatten() == labels[judged]).float().mean())
                for i, state in enumerate(states)]

    def peer() -> list[float]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return [LogisticRegression(C=1.0, max_iter=5000).fit(state[fitted].numpy(), labels[fitted].numpy())
                    .score(state[judged].numpy(), labels[judged].numpy()) for state in states]

    np.testing.assert_allclose(ours(), peer(), rtol=0, atol=max(EQUAL, 2 / len(labels[judged])))
    return {"ours": ours, "peer": peer}


def scans(size: Size) -> dict[str, Callable[[], Any]]:
    """Leaving out, mean-ablating and resampling every layer of every loop, and the NLL of each answer."""
    model, tokens = build(size)
    scored = torch.ones_like(tokens, dtype=torch.bool)
    other = derangement(len(tokens), 0)
    metric, every, topology = nll_of(tokens, scored), torch.arange(len(tokens)), model.config.topology(size.n_loops)

    def ours() -> Tensor:
        found = causal_scan(model, tokens, targets=tokens, effects=("skip", "mean", "resample"), n_loops=size.n_loops,
                            scored=scored, seed=0)
        return torch.as_tensor((found.nll + found.clean_nll).values)

    @torch.no_grad()
    def peer() -> Tensor:
        before: dict[str, Tensor] = {}

        def keep(x: Tensor, *, hook: Any) -> None:
            before["state"] = x

        def skip(x: Tensor, *, hook: Any) -> Tensor:
            return before["state"]

        def mean(x: Tensor, *, hook: Any) -> Tensor:
            return before["state"] + (x - before["state"]).mean(0)

        def resample(x: Tensor, *, hook: Any) -> Tensor:
            return before["state"] + (x - before["state"])[other]

        values = [metric(model.run_with_hooks(tokens, size.n_loops, fwd_hooks=[
            (topology.site_at(depth, "hook_resid_pre"), keep), (topology.site_at(depth), change)]), every)
            for change in (skip, mean, resample) for depth in range(topology.depth)]
        return torch.stack(values).unflatten(0, (3, topology.depth))

    torch.testing.assert_close(ours().float(), peer(), atol=1e-3, rtol=1e-3)
    return {"ours": ours, "peer": peer}


def lenses(size: Size) -> dict[str, Callable[[], Any]]:
    """The logit lens at every depth and position: log-probability of the targets."""
    from hooks.bridges.tl_adapter import unroll

    model, tokens = build(size)
    clean = tokens % model.config.mask_token_id
    bridge: Any = unroll(model, size.n_loops)

    def ours() -> Tensor:
        return torch.as_tensor(read_lens(model, tokens, n_loops=size.n_loops, targets=clean).nll.values)

    @torch.no_grad()
    def peer() -> Tensor:
        from transformer_lens.tools.analysis.logit_lens import logit_lens

        found = logit_lens(bridge, tokens, positions=None, return_type="logits")
        logits: Tensor = found.values if isinstance(found.values, Tensor) else found.logits
        return -logits.log_softmax(-1).gather(-1, clean.expand(len(logits), -1, -1)[..., None])[..., 0]

    torch.testing.assert_close(ours(), peer()[1:], atol=2e-3, rtol=1e-3)
    return {"ours": ours, "peer": peer}


def recordings(size: Size) -> dict[str, Callable[[], Any]]:
    """Every site there is: our hook points against every operation, which is what TorchLens records."""
    import torchlens

    model, tokens = build(size)
    plain = PlainLoopMDM(model).eval()

    def ours() -> Any:
        return model.run_with_cache(tokens, size.n_loops)

    @torch.no_grad()
    def peer() -> Any:
        return torchlens.record(plain, [tokens, size.n_loops], default_op=True)

    assert len(ours()[1]) > size.depth
    assert len(peer()) > size.depth
    return {"ours": ours, "peer": peer}


# ------------------------------------------------------------------------------------- memory

def probe_memory(*, examples: int = 256, pos: int = 64, width: int = 128, processes: int = 3) -> Comparison:
    """Peak resident memory of probes over 8 loops ÷ the size of what they read, in processes of their own."""
    arguments = json.dumps({"examples": examples, "pos": pos, "width": width})
    ratios = []
    for _ in range(processes):
        done = subprocess.run([sys.executable, "-m", "benchmarks.measurements", arguments], capture_output=True,
                              text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the run in a process of its own failed:\n{done.stderr[-2000:]}")
        ratios.append(float(done.stdout.splitlines()[-1]))
    return Comparison(f"width {width}, 4 layers, 8 loops, {examples} × {pos}",
                      "peak memory of probes at all sites ÷ size of the recording",
                      Estimate(float(np.median(ratios)), min(ratios), max(ratios)), 2.0)


def _probed(examples: int, pos: int, width: int) -> float:
    torch.set_num_threads(1)
    size = Size("", width, 4, 1, 8, examples, pos, rounds=1, extra_rounds=1)
    model, tokens = build(size)
    groups = torch.zeros(pos, dtype=torch.long)
    probe_latent(model, tokens[:8], tokens[:8] % CLASSES, CLASSES, groups=groups, n_loops=1)
    before = resident_mb(afresh=True)
    probe_latent(model, tokens, tokens % CLASSES, CLASSES, groups=groups, n_loops=size.n_loops)
    return (resident_mb() - before) / (size.depth * tokens.numel() * width * 4 / 2 ** 20)


if __name__ == "__main__":
    print(_probed(**json.loads(sys.argv[1])))
