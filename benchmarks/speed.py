"""What recording and editing cost, against doing it by hand, torch hooks, TransformerLens and nnsight.

Two models: a small one, where overhead shows, and a wide one. All contenders share one set of
weights and must keep the same tensors: the benchmark checks that before it times them.

    rows = measure(SMALL, rounds=200)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.plain import PlainLoopMDM
from benchmarks.timing import Estimate, Times, alternate, compare, compare_extra, milliseconds
from hooks import HookedLoopMDM, LoopMDMConfig
from hooks.edits import steer

NAMES = "blocks.*.hook_resid_post"
OURS_ABOVE = ("recording: ours", "ours, unhooked")
NNSIGHT_ABOVE = ("recording: nnsight", "plain PyTorch")
BY_HAND_ABOVE = ("recording: by hand", "plain PyTorch")


@dataclass(frozen=True)
class Size:
    """One model, one input, one run."""

    name: str
    d_model: int
    n_heads: int
    n_tail_layers: int       # after 1 head layer and 2 looped ones
    n_loops: int
    batch: int
    pos: int
    rounds: int              # of a full benchmark
    extra_rounds: int        # of the comparison of small differences

    @property
    def depth(self) -> int:
        return 1 + 2 * self.n_loops + self.n_tail_layers


SMALL = Size("width 64, 4 layers, 8 loops (18 unrolled), batch 8 × 32", 64, 4, 1, 8, 8, 32,
             rounds=100, extra_rounds=100)
WIDE = Size("width 256, 12 layers, 8 loops (26 unrolled), batch 4 × 64", 256, 8, 9, 8, 4, 64,
            rounds=20, extra_rounds=80)
TINY = Size("tiny, for the tests", 16, 2, 1, 2, 2, 6, rounds=3, extra_rounds=3)


@dataclass(frozen=True)
class Comparison:
    """One line of the table: what was compared, what came out, what the target was."""

    size: str
    what: str
    ratio: Estimate
    target: float | None

    @property
    def holds(self) -> bool | None:
        return None if self.target is None else self.ratio.median <= self.target


def build(size: Size) -> tuple[HookedLoopMDM, Tensor]:
    """The model with random weights, its unembedding too, and tokens."""
    config = LoopMDMConfig(vocab_size=64, mask_token_id=63, max_seq_len=size.pos, d_model=size.d_model,
                           n_heads=size.n_heads, d_mlp=4 * size.d_model, n_tail_layers=size.n_tail_layers,
                           max_loops=size.n_loops)
    generator = torch.Generator().manual_seed(0)
    model = HookedLoopMDM(config).eval()
    model.reset_parameters(generator)
    assert model.unembed_weight is not None
    torch.nn.init.normal_(model.unembed_weight, std=size.d_model ** -0.5, generator=generator)
    return model, torch.randint(0, 64, (size.batch, size.pos), generator=generator)


def contenders(size: Size) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], list[Tensor]]]]:
    """Everything to be timed, and of those that record, what they kept in order of depth."""
    from nnsight import NNsight

    from hooks.bridges.tl_adapter import unroll

    model, tokens = build(size)
    plain, hookable, bridge = PlainLoopMDM(model).eval(), PlainLoopMDM(model).eval(), unroll(model, size.n_loops)
    traced: Any = NNsight(PlainLoopMDM(model).eval())
    loops, layer, loop = size.n_loops, 2, size.n_loops // 2
    depth = 2 * loop + layer
    vector = torch.ones(size.d_model)
    kept: list[Tensor] = []
    for block in hookable.blocks:
        block.register_forward_hook(lambda module, args, output: kept.append(output.detach().clone()))
    edited = PlainLoopMDM(model).eval()
    count = [0]

    def steer_by_count(module: Any, args: Any, output: Tensor) -> Tensor:
        count[0] += 1
        return output + vector if count[0] == loop + 1 else output

    edited.blocks[layer].register_forward_hook(steer_by_count)

    def torch_hooks() -> list[Tensor]:
        kept.clear()
        hookable(tokens, loops)
        return list(kept)

    def torch_hook_edit() -> Tensor:
        count[0] = 0
        return edited(tokens, loops)

    def nnsight_recording() -> Any:
        with traced.trace(tokens, loops) as tracer:
            held = list().save()  # nnsight saves what a call returns, so no []
            held.append(traced.blocks[0].output.clone())
            for _ in tracer.iter[:loops]:
                held.append(traced.blocks[1].output.clone())
                held.append(traced.blocks[2].output.clone())
            for i in range(3, 3 + size.n_tail_layers):
                held.append(traced.blocks[i].output.clone())
        return held

    def nnsight_edit() -> Any:
        with traced.trace(tokens, loops) as tracer:
            for _ in tracer.iter[loop:loop + 1]:
                traced.blocks[layer].output = traced.blocks[layer].output + vector
            logits = traced.output.save()
        return logits

    def ours() -> list[Tensor]:
        rec = model.run_with_cache(tokens, loops, names_filter=NAMES)[1]
        return [rec[model.config.topology(loops).site_at(d)] for d in range(size.depth)]

    def cached() -> list[Tensor]:
        cache = bridge.run_with_cache(tokens, names_filter=lambda name: name.endswith("hook_resid_post"))[1]
        return [cache[f"blocks.{d}.hook_resid_post"] for d in range(size.depth)]

    edits = [steer(f"blocks.{layer}.hook_resid_post@{loop}", vector)]
    timed = {
        "plain PyTorch": lambda: plain(tokens, loops),
        "ours, unhooked": lambda: model(tokens, loops),
        "TransformerLens bridge, unhooked": lambda: bridge(tokens),
        "recording: by hand": lambda: plain.forward_keeping(tokens, loops),
        "recording: ours": lambda: model.run_with_cache(tokens, loops, names_filter=NAMES),
        "recording: torch hooks": torch_hooks,
        "recording: TransformerLens": lambda: bridge.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("hook_resid_post")),
        "recording: nnsight": nnsight_recording,
        "edit: by hand": lambda: plain.forward_steered(tokens, loops, layer, loop, vector),
        "edit: ours": lambda: model.run_with_hooks(tokens, loops, fwd_hooks=edits),
        "edit: torch hooks": torch_hook_edit,
        "edit: TransformerLens": lambda: bridge.run_with_hooks(
            tokens, fwd_hooks=[(f"blocks.{depth}.hook_resid_post", lambda x, hook: x + vector)]),
        "edit: nnsight": nnsight_edit,
    }
    keeping = {"recording: by hand": lambda: plain.forward_keeping(tokens, loops)[1], "recording: ours": ours,
               "recording: torch hooks": torch_hooks, "recording: TransformerLens": cached,
               "recording: nnsight": nnsight_recording}
    return timed, keeping


def check(timed: dict[str, Callable[[], Any]], keeping: dict[str, Callable[[], list[Tensor]]]) -> None:
    """All recorders keep the same tensors, all edits give the same logits; AssertionError otherwise."""
    expected = keeping["recording: by hand"]()
    for name, kept in keeping.items():
        for one, other in zip(kept(), expected, strict=True):
            torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
    for kind in ("edit: ", "plain PyTorch", "ours, unhooked"):
        of_kind = [name for name in timed if name.startswith(kind)]
        expected_logits = timed["edit: by hand" if kind == "edit: " else "plain PyTorch"]()
        for name in of_kind:
            torch.testing.assert_close(timed[name](), expected_logits, atol=2e-3, rtol=1e-3,
                                       msg=lambda m, name=name: f"{name}: {m}")


def measure(size: Size, *, rounds: int | None = None) -> tuple[Times, list[Comparison]]:
    """Times by contender, and the comparisons that the project has set itself."""
    with torch.no_grad():
        timed, keeping = contenders(size)
        check(timed, keeping)
        times = alternate(timed, rounds=rounds or size.rounds)
        extra = alternate({name: timed[name] for name in dict.fromkeys(OURS_ABOVE + NNSIGHT_ABOVE + BY_HAND_ABOVE)},
                          rounds=rounds or size.extra_rounds)
    return times, comparisons(size, times, extra)


def comparisons(size: Size, times: Times, extra: Times) -> list[Comparison]:
    """The table's lines. ``extra`` is a run of its own, of fewer contenders and more rounds: what recording adds to
    a forward is a small difference of large numbers."""
    def line(what: str, ours: str, theirs: str, target: float | None) -> Comparison:
        return Comparison(size.name, what, compare(times, ours, theirs), target)

    return [
        line("unhooked ÷ plain PyTorch", "ours, unhooked", "plain PyTorch", 1.02),
        line("recording ÷ clones by hand", "recording: ours", "recording: by hand", 1.05),
        line("recording ÷ torch hooks", "recording: ours", "recording: torch hooks", None),
        line("recording ÷ TransformerLens", "recording: ours", "recording: TransformerLens", 1.0),
        line("recording ÷ nnsight", "recording: ours", "recording: nnsight", None),
        Comparison(size.name, "recording, time above unhooked ÷ nnsight's",
                   compare_extra(extra, OURS_ABOVE, NNSIGHT_ABOVE), 0.5),
        Comparison(size.name, "clones by hand, time above plain ÷ nnsight's",
                   compare_extra(extra, BY_HAND_ABOVE, NNSIGHT_ABOVE), None),
        line("edit ÷ by hand", "edit: ours", "edit: by hand", None),
        line("edit ÷ torch hooks", "edit: ours", "edit: torch hooks", None),
        line("edit ÷ TransformerLens", "edit: ours", "edit: TransformerLens", 1.0),
        line("edit ÷ nnsight", "edit: ours", "edit: nnsight", 1.0),
    ]


__all__ = ["SMALL", "TINY", "WIDE", "Comparison", "Size", "build", "check", "contenders", "measure", "milliseconds"]
