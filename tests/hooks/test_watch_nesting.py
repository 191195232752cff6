"""watch numbers every firing rightly, whatever the nesting: random programs against a count by hand."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from hooks.foreign.watching import watch


class Leaf(nn.Module):
    """Adds to its log the number of its call among all calls, and returns it."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def forward(self, x):
        self.log.append((self, None))
        return torch.full((1,), float(len(self.log)))


class Program(nn.Module):
    """Runs a tree of ('leaf', name) and ('loop', letter, count, children)."""

    def __init__(self, tree):
        super().__init__()
        self.tree, self.log, self.expected, self.axes = tree, [], {}, {}
        self.leaves = nn.ModuleDict()
        self._declare(tree, ())

    def _declare(self, nodes, axes):
        for node in nodes:
            if node[0] == "leaf":
                self.leaves[node[1]] = Leaf(self.log)
                self.axes[node[1]] = axes
            else:
                self._declare(node[3], (*axes, (node[1], node[2])))

    def forward(self, x):
        self.log.clear()
        self.expected = {}
        self._run(self.tree, ())
        return x

    def _run(self, nodes, at):
        for node in nodes:
            if node[0] == "leaf":
                axes = self.axes[node[1]]
                parts = [str(i) if len(at) == 1 else f"{letter}{i}" for (letter, _), i in zip(axes, at, strict=True)]
                site = f"leaves.{node[1]}.hook_out" + ("@" + ".".join(parts) if parts else "")
                self.expected[site] = float(self.leaves[node[1]](torch.zeros(1)))
            else:
                for i in range(node[2]):
                    self._run(node[3], (*at, i))


@st.composite
def programs(draw):
    """A random tree of nested loops, each leaf in it once, each loop with a letter of its own."""
    letters, names = iter("abcdefghijklmnop"), iter(f"m{i}" for i in range(99))

    def nodes(depth):
        made = []
        for _ in range(draw(st.integers(1, 3 if depth else 4))):
            if depth < 3 and draw(st.booleans()):
                letter = next(letters, None)
                if letter:
                    made.append(("loop", letter, draw(st.integers(1, 3)), nodes(depth + 1)))
                    continue
            made.append(("leaf", next(names)))
        return made

    return nodes(0)


@given(programs())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_no_firing_is_misnumbered_in_any_nesting(tree):
    model = Program(tree)
    schedule = {name: axes[0][1] if len(axes) == 1 else dict(axes) for name, axes in model.axes.items() if axes}
    with watch(model, "leaves.*.hook_out", schedule=schedule) as rec:
        model(torch.zeros(1))
        model(torch.zeros(1))
    assert {site: float(value) for site, value in rec.items()} == model.expected
    with watch(model, "leaves.*.hook_out") as rec:  # discovered: numbered in order, without nesting
        model(torch.zeros(1))
    flat: dict[str, list[float]] = {}
    for site, value in model.expected.items():
        flat.setdefault(site.partition("@")[0], []).append(value)
    assert {name: [float(rec[name])] if name in rec else rec.stack(name).flatten().tolist() for name in flat} == flat
