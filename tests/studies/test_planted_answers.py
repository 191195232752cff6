"""The stage test's content half on planted answers: a model that fills in one row per loop, and labels that are chance.

`copying` is a LoopMDM with weights set by hand for an automaton in which every row repeats the one above (rule 204).
Its second looped layer attends to the cell above and adds that cell's value to the state. So row k can be read after
loop k (counted from 1) and not before, and all that is measured has a value known beforehand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooks import HookedLoopMDM, LoopMDMConfig
from probes import stages
from probes.cycles import own_loops
from probes.intervals import Interval, bootstrap
from studies.questions.stages import content as content_half
from studies.questions.stages import operation as operation_half
from studies.questions.stages.operation import Operation, Setting
from studies.tasks import Automaton
from studies.tasks.contract import Latent
from studies.zoo import Entry
from tests.small import small_model

ROWS, WIDTH, S_MAX = 4, 10, 3
TASK = Automaton(rule=204, width=WIDTH, rows=ROWS)


def config_of(task: Automaton, **changes: object) -> LoopMDMConfig:
    base = LoopMDMConfig(vocab_size=task.vocab_size, mask_token_id=task.mask_token_id, max_seq_len=task.seq_len,
                         d_model=2 * task.seq_len, n_heads=1, d_mlp=8, max_loops=S_MAX, position="learned",
                         qk_norm=False)
    return replace(base, **changes)  # type: ignore[arg-type]


def copying() -> HookedLoopMDM:
    """State: the cell's value (−1, +1, 0 where masked) in channel 0, the position in a channel of its own."""
    model = HookedLoopMDM(config_of(TASK)).eval()
    d, gain = model.config.d_model, 10.0
    with torch.no_grad():
        for block in model.blocks:
            block.attn.out.weight.zero_()
            block.mlp.down.weight.zero_()
        model.embed.weight.zero_()
        model.embed.weight[:2, 0] = torch.tensor([-1.0, 1.0])
        model.pos_embed[0].weight.copy_(torch.eye(d)[1:1 + TASK.seq_len])
        copier = model.blocks[2].attn
        copier.qkv.weight.zero_()
        queries, keys, values = copier.qkv.weight.view(3, d, d)
        for pos in range(TASK.seq_len):
            above = max(pos - WIDTH, pos % WIDTH)   # the first row looks at itself
            queries[pos, 1 + pos] = keys[pos, 1 + above] = gain
        values[0, 0] = copier.out.weight[0, 0] = 1.0
        model.unembed_weight.zero_()
        model.unembed_weight[:2, 0] = torch.tensor([-1.0, 1.0])
    return model


def triplet(loop: HookedLoopMDM, task: Automaton) -> dict[str, Entry]:
    config = loop.config
    models = {"loop": loop, "twin": HookedLoopMDM(replace(config, max_loops=1)).eval(),
              "deep": HookedLoopMDM(replace(config, max_loops=1, n_loop_layers=2 * S_MAX)).eval()}
    return {kind: Entry(Path(kind), {"kind": kind}, task, model) for kind, model in models.items()}


@pytest.fixture(scope="module")
def setting() -> Setting:
    return Setting.draw(triplet(copying(), TASK), n_examples=120, t=1.0, seed=0, n_untrained=2)


@pytest.fixture(scope="module")
def content(setting: Setting) -> Operation:
    return content_half.measure_content(setting)


def zeros_by_row(setting: Setting) -> np.ndarray:
    """[row]: share of zeros, which is what the model answers where it knows nothing."""
    return (setting.batch.tokens.view(-1, ROWS, WIDTH) == 0).double().mean((0, 2)).numpy()


def test_answers_are_right_row_by_row(setting: Setting, content: Operation) -> None:
    zeros = zeros_by_row(setting)
    expected = [[1.0 if row <= after else zeros[row] for row in range(1, ROWS)] for after in range(1, 2 * S_MAX + 1)]
    found = content.datasets["accuracy_over_loops"].accuracy_by_region.sel(kind="loop", region=[1, 2, 3])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(content.datasets["coda_by_region"].accuracy.sel(region=[1, 2, 3]), expected[:S_MAX],
                               atol=1e-6)
    gain = content.value("accuracy_gain", "loop")
    assert isinstance(gain, Interval)
    assert gain.value == pytest.approx(1 - np.mean(expected[0]), abs=1e-6)
    beyond = content.value("accuracy_beyond", "loop")
    assert isinstance(beyond, Interval)
    assert beyond.value == beyond.low == beyond.high == 0


def test_one_row_per_loop_is_gained_and_chance_counts_as_nothing(setting: Setting, content: Operation) -> None:
    zeros = zeros_by_row(setting)
    chance = max(zeros[1:].mean(), 1 - zeros[1:].mean())
    known = [sum((float(1.0 if row <= after else zeros[row]) - chance) / (1 - chance) for row in range(1, ROWS))
             for after in range(1, S_MAX + 1)]
    coda = content.value("coda_slope", "loop")
    assert isinstance(coda, Interval)
    assert coda.value == pytest.approx((known[2] - known[0]) / 2, abs=1e-6)   # least squares over three loops
    assert coda.value == pytest.approx(1, abs=0.1)
    probes = content.value("probe_slope", "loop")
    assert isinstance(probes, Interval)
    assert probes.value == pytest.approx(1, abs=0.15)


def test_probes_read_the_last_layer_of_each_loop(content: Operation) -> None:
    accuracy = content.datasets["probe_by_region"].accuracy_loop
    for loop in range(S_MAX):
        for row in range(1, ROWS):
            found = float(accuracy.sel(loop_loop=loop, region=row))
            assert found == 1 if row <= loop + 1 else abs(found - 0.5) < 0.12, (loop, row, found)


@dataclass(frozen=True)
class Chance(Automaton):
    """Its only latent is a bit that the first row decides as a hash does: nothing learned on other rows helps."""

    def latents(self, tokens: Int[Tensor, "example pos"],
                free: Bool[Tensor, "example pos"] | None = None) -> Mapping[str, Latent]:
        bits = [hashlib.sha256(bytes(row[:self.width])).digest()[0] & 1 for row in tokens.tolist()]
        return {"bit": Latent(torch.tensor(bits)[:, None].expand(tokens.shape).clone(), 2, "a hash of the first row")}


def test_labels_that_are_chance_are_read_at_chance() -> None:
    """A wide, very non-linear model tells examples apart: a probe fitted on held-out ones would know their labels."""
    task = Chance(rule=110, width=12, rows=2)
    loop = small_model(vocab_size=3, mask_token_id=2, max_seq_len=task.seq_len, d_model=128, d_mlp=256, n_heads=8,
                       max_loops=2)
    with torch.no_grad():
        for block in loop.blocks:
            for part in (block.attn.out, block.mlp.up, block.mlp.down):
                part.weight.mul_(6)
    setting = Setting.draw(triplet(loop, task), n_examples=80, t=1.0, seed=0, n_untrained=2)
    accuracy = content_half.measure_content(setting).datasets["probe_by_region"].accuracy_loop.sel(region=1)
    assert abs(float(accuracy.mean()) - 0.5) < 0.1, accuracy.values   # 0.67 if they are fitted on the held-out split


# ------------------------------------------------------------------------------------- attention frozen


def frozen_by_hand(model: HookedLoopMDM, noised: Tensor, n_loops: int, after: int, t: float | None = None) -> Tensor:
    """Answers with every looped layer's pattern after loop ``after`` replaced by the one that it had there."""
    sites = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in (1, 2)}
    _, rec = model.run_with_cache(noised, n_loops, t=t)
    edits = [(f"{site}@{k}", lambda x, hook, kept=rec[f"{site}@{after}"]: kept)
             for site in sites.values() for k in range(after + 1, n_loops)]
    return model.run_with_hooks(noised, n_loops, fwd_hooks=edits, t=t).argmax(-1)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_frozen_attention_keeps_the_patterns_of_the_loop_it_names(after: int) -> None:
    model = small_model(2, vocab_size=40)
    model.unembed_bias.data.zero_()
    noised = torch.randint(0, 40, (16, 10), generator=torch.Generator().manual_seed(1))
    cycle = own_loops(model.topology(4))
    expected = {k: frozen_by_hand(model, noised, 4, k) for k in range(4)}
    assert all(not torch.equal(expected[k], expected[after]) for k in range(4) if k != after)
    assert torch.equal(stages.frozen_attention(model, noised, cycle, after=after), expected[after])


def test_the_study_freezes_after_the_loop_it_names() -> None:
    task = Automaton(rule=30, width=6, rows=4)
    loop = small_model(1, vocab_size=3, mask_token_id=2, max_seq_len=task.seq_len, max_loops=S_MAX)
    setting = Setting.draw(triplet(loop, task), n_examples=48, t=0.5, seed=0, n_untrained=2)
    with torch.no_grad():   # both answers alike probable, so that what attention brings decides
        logits = loop(setting.noised, S_MAX, t=0.5)
        loop.unembed_bias[1] -= (logits[..., 1] - logits[..., 0])[setting.noised == 2].median()
    found = operation_half.measure_operation(setting)
    free = setting.batch.free
    right = [(((frozen_by_hand(loop, setting.noised, S_MAX, after, 0.5) == setting.batch.tokens) & free).sum(1)
              / free.sum(1)).numpy() for after in range(S_MAX)]
    assert len({float(share.mean()) for share in right}) == S_MAX, "freezing earlier or later is not the same here"
    curve = found.datasets["frozen_attention"].accuracy_loop
    np.testing.assert_allclose(curve, [share.mean() for share in right], atol=1e-6)
    assert found.value("frozen", "loop") == bootstrap(np.mean, right[1], seed=0)
    assert found.value("lost", "loop") == bootstrap(np.mean, right[2] - right[1], seed=0)
