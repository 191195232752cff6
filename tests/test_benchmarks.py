"""The benchmark measures what it says: equal contenders, honest ratios, tables that read back."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from benchmarks import measurements, report
from benchmarks.memory import Kept, Peak, peaks
from benchmarks.plain import PlainLoopMDM
from benchmarks.speed import TINY, Comparison, build, measure
from benchmarks.timing import Estimate, compare, compare_extra
from hooks import HookedLoopMDM
from hooks.edits import edit, steer
from tests.small import small_config


def test_the_plain_model_is_the_model_bit_for_bit() -> None:
    model, tokens = build(TINY)
    plain = PlainLoopMDM(model)
    with torch.no_grad():
        for n_loops in (1, 2, 5):
            logits, rec = model.run_with_cache(tokens, n_loops, names_filter="blocks.*.hook_resid_post")
            plain_logits, kept = plain.forward_keeping(tokens, n_loops)
            assert torch.equal(plain(tokens, n_loops), logits)
            assert torch.equal(plain_logits, logits)
            topology = model.config.topology(n_loops)
            assert len(kept) == topology.depth
            assert all(torch.equal(one, rec[topology.site_at(d)]) for d, one in enumerate(kept))
        vector = torch.ones(model.config.d_model)
        with edit(model, [steer("blocks.2.hook_resid_post@3", vector)], n_loops=5):
            assert torch.equal(model(tokens, 5), plain.forward_steered(tokens, 5, 2, 3, vector))
    assert not torch.equal(plain(tokens, 1), plain(tokens, 2))


def test_the_plain_model_refuses_what_it_is_not_written_for() -> None:
    with pytest.raises(ValueError, match="written for norm='rms' only"):
        PlainLoopMDM(HookedLoopMDM(small_config(norm="layer")))


def test_ratios_are_medians_of_ratios_within_rounds() -> None:
    slow = np.array([1.0, 5.0, 1.0, 1.0, 9.0])  # whatever slows a round slows all
    times = {"base": slow, "ours": 1.1 * slow, "theirs": 1.4 * slow}
    assert compare(times, "ours", "base") == pytest.approx((1.1, 1.1, 1.1))
    extra = compare_extra(times, ("ours", "base"), ("theirs", "base"))
    assert extra.median == pytest.approx(0.25)
    assert compare({"a": np.array([1.0, 2.0, 3.0]), "b": np.ones(3)}, "a", "b").median == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the peers' own warnings
def test_every_contender_keeps_and_edits_the_same() -> None:
    times, lines = measure(TINY)
    assert all(len(of_one) == 3 and (of_one > 0).all() for of_one in times.values())
    assert {line.target for line in lines} >= {1.02, 1.05, 0.5, 1.0}


@pytest.mark.slow
def test_memory_with_a_reducer_stays_flat() -> None:
    measured = peaks([1, 24], processes=1, batch=32, pos=64, width=128)
    one, many, kept = (measured[key] for key in ((1, "norms"), (24, "norms"), (24, "all")))
    assert many.allocated_mb <= 1.1 * one.allocated_mb  # resident memory is the system's to give and to take back
    fifty_activations = 50 * 32 * 64 * 128 * 4 / 2 ** 20
    assert kept.allocated_mb - many.allocated_mb > 0.9 * fifty_activations  # or the measure sees nothing


def test_the_tables_are_written_between_the_markers_of_their_page(tmp_path: Path) -> None:
    lines = [Comparison("small", "a ÷ b", Estimate(1.1, 1.0, 1.2), 1.05), Comparison("small", "c ÷ d",
                                                                                  Estimate(0.5, 0.4, 0.6), 1.0)]
    table = report.comparison_table(lines)
    assert "| small | a ÷ b | 1.100 [1.000, 1.200] | ≤ 1.05 | **no** |" in table
    assert "| ≤ 1 | yes |" in table
    memory = {(n, kept): Peak(10.0 * (n if kept == "all" else 1), np.array([200.0, 210.0, 190.0])) for n in (1, 24)
              for kept in get_args(Kept)}
    assert ("| 24 | 10.0 MiB | 200.0 MiB | 10.0 MiB | 200.0 MiB | 240.0 MiB | 200.0 MiB |"
            in report.memory_table(memory))
    assert [line.holds for line in report.memory_lines(memory)] == [True, None, None]
    page = tmp_path / "docs" / "benchmarks.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- benchmarks: begin -->\nlast week\n<!-- benchmarks: end -->\nafter")
    report.write(lines, {"small": {"a": np.ones(3)}}, memory, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert table in text
    assert report.memory_table(memory) in text
    assert "| small | a | " in text
    assert "last week" not in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_measurements_and_their_peers_say_the_same() -> None:
    lines = measurements.measure(TINY, rounds=1)
    assert [line.target for line in lines] == [1 / 20, 0.4, 0.4, 1, 0.1]
    assert all(line.ratio.median > 0 for line in lines)


@pytest.mark.slow
def test_the_memory_of_probes_is_measured_against_what_they_read() -> None:
    line = measurements.probe_memory(examples=64, pos=32, width=64, processes=1)
    assert line.target == 2
    assert 0.5 < line.ratio.median < 20          # at least a good part of the recording is held
