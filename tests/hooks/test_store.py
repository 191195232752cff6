"""Recordings on disk and along denoising steps: what is read is what was recorded; half a store is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooks import HookedLoopMDM, SiteError
from hooks.edits import edit, skip_loop
from hooks.model.diffusion import DenoisingStep, SamplerConfig, sample
from hooks.model.sampling import record_sampling
from hooks.recording import Recording
from hooks.reducers import CosineToPrevious, Mean, Norm
from hooks.store import RecordingWriter, open_recording
from tests.small import MASK, small_tokens

pytestmark = pytest.mark.usefixtures("no_gradients")

POST = "blocks.2.hook_resid_post"
NAMES = "blocks.*.hook_resid_post"
N = 4


def record(model: HookedLoopMDM, tokens: Tensor, **options: Any) -> Recording:
    return model.run_with_cache(tokens, N, **{"names_filter": NAMES, **options})[1]


# ------------------------------------------------------------------------- on disk


def test_batches_appended_are_the_recording_of_the_whole(model: HookedLoopMDM, tmp_path: Path) -> None:
    tokens = small_tokens(batch=7)
    names = [NAMES, "**.attn.hook_pattern", "hook_embed"]
    whole = record(model, tokens, names_filter=names)
    with RecordingWriter(tmp_path / "run.zarr") as out:
        for rows in (slice(0, 3), slice(3, 6), slice(6, 7)):
            out.append(record(model, tokens, names_filter=names, batch_slice=rows), tokens=tokens[rows])
        assert not (tmp_path / "run.zarr").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run.zarr"]
    back = open_recording(tmp_path / "run.zarr")
    assert sorted(back) == sorted(whole)
    for site in whole:
        assert torch.equal(back[site], whole[site])
    assert torch.equal(back.stack(POST), whole.stack(POST))
    assert back.residual_stream().equals(whole.residual_stream())
    assert back.to_xarray(POST).load().drop_vars("loop").equals(whole.to_xarray(POST))
    assert (back.dataset.tokens.values == tokens.numpy()).all()
    assert torch.equal(back.at(batch=slice(2, 5))[f"{POST}@1"], whole[f"{POST}@1"][2:5])
    assert back.topology == whole.topology


def test_nothing_is_read_before_it_is_asked_for(model: HookedLoopMDM, tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "run.zarr") as out:
        out.append(record(model, small_tokens()))
    back = open_recording(tmp_path / "run.zarr")
    assert POST in repr(list(back))
    assert not back.dataset[POST].variable._in_memory
    back[f"{POST}@1"]
    assert not back.dataset[POST].variable._in_memory


def test_looped_names_still_need_their_loop(model: HookedLoopMDM, tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "run.zarr") as out:
        out.append(record(model, small_tokens(), names_filter=[f"{NAMES}@1:3"]))
    back = open_recording(tmp_path / "run.zarr")
    assert back.dataset.loop.values.tolist() == [1, 2]
    assert sorted(back) == [f"blocks.{layer}.hook_resid_post@{k}" for layer in (1, 2) for k in (1, 2)]
    with pytest.raises(SiteError, match="names 4 sites"):
        back[POST]
    with pytest.raises(SiteError, match="was not recorded in this run"):
        back[f"{POST}@0"]
    with pytest.raises(SiteError, match="No site is called"):
        back.to_xarray("hook_embed")


def test_reductions_keep_their_labels(model: HookedLoopMDM, tmp_path: Path) -> None:
    reduced = record(model, small_tokens(), reduce=Mean("pos"))
    with RecordingWriter(tmp_path / "run.zarr", axis="run") as out:
        out.append(reduced, t=0.5)
        out.append(record(model, small_tokens(seed=1), reduce=Mean("pos")), t=0.25)
    back = open_recording(tmp_path / "run.zarr")
    assert back.to_xarray(POST).dims == ("run", "loop", "batch", "d_model")
    assert back.to_xarray(POST).attrs["definition"] == "mean over pos"
    assert back.dataset.t.values.tolist() == [0.5, 0.25]
    assert torch.equal(back.at(run=0)[f"{POST}@1"], reduced[f"{POST}@1"])


def test_masked_positions_append_along_points(model: HookedLoopMDM, tmp_path: Path) -> None:
    parts = [record(model, small_tokens(seed=seed), only="masked") for seed in range(3)]
    with RecordingWriter(tmp_path / "run.zarr", axis="point") as out:
        for part in parts:
            out.append(part)
    assert torch.equal(open_recording(tmp_path / "run.zarr")[f"{POST}@2"], torch.cat([p[f"{POST}@2"] for p in parts]))


def test_a_store_is_whole_or_absent(model: HookedLoopMDM, tmp_path: Path) -> None:
    path, rec = tmp_path / "run.zarr", record(model, small_tokens())
    with pytest.raises(KeyError, match="stop"):
        self_destruct(path, rec)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="is not a recording: it is written when RecordingWriter's block ends"):
        open_recording(path)
    with pytest.raises(ValueError, match="nothing was appended"), RecordingWriter(path):
        pass
    with RecordingWriter(path) as out:
        out.append(rec)
    with pytest.raises(FileExistsError, match="exists: remove it, or write under another name"), RecordingWriter(path):
        pass
    assert torch.equal(open_recording(path)[f"{POST}@0"], rec[f"{POST}@0"])


def self_destruct(path: Path, rec: Recording) -> None:
    with RecordingWriter(path) as out:
        out.append(rec)
        raise KeyError("stop")


@pytest.mark.parametrize(("options", "axis", "message"), [
    ({"names_filter": POST}, "batch", r"recording 1 of .* holds other sites than the first, \['blocks.0"),
    ({"pos_slice": slice(0, 4)}, "batch", "recording 1 does not continue .* along 'batch'"),
    ({"reduce": Mean("batch")}, "batch", "has no axis 'batch', its axes are .*: append along another, such as 'step'"),
    ({"names_filter": [f"{POST}@1", "blocks.1.hook_resid_post@2"]}, "batch", "other"),
])
def test_what_does_not_continue_a_store_is_refused(options: dict[str, Any], axis: str, message: str,
                                                   model: HookedLoopMDM, tmp_path: Path) -> None:
    other = record(model, small_tokens(), **options)
    with RecordingWriter(tmp_path / "run.zarr", axis=axis) as out:
        out.append(record(model, small_tokens()))
        with pytest.raises(ValueError, match=message):
            out.append(other)


# ----------------------------------------------------------------- along denoising steps


def prompt() -> Tensor:
    tokens = torch.full((3, 9), MASK)
    tokens[:, :2] = 1
    return tokens


@pytest.mark.parametrize("order", ["ancestral", "confidence"])
def test_each_step_is_recorded_as_its_own_forward(order: Any, model: HookedLoopMDM) -> None:
    config = SamplerConfig(n_steps=4, order=order, n_loops=3)
    seen: list[tuple[DenoisingStep, Recording]] = []
    trace = record_sampling(model, prompt(), config, lambda step, rec: seen.append((step, rec)), names_filter=NAMES,
                            generator=torch.Generator().manual_seed(0))
    plain = sample(model, prompt(), config, generator=torch.Generator().manual_seed(0))
    assert [step.step for step, _ in seen] == [0, 1, 2, 3]
    assert all(torch.equal(a.after, b.after) for a, b in zip(trace, plain, strict=True))
    for step, rec in seen:
        _, expected = model.run_with_cache(step.before, 3, names_filter=NAMES)
        assert list(rec) == list(expected)
        assert all(torch.equal(rec[site], expected[site]) for site in rec)
        assert rec.residual_stream().equals(expected.residual_stream())
    assert not any(point.entries for point in model.hook_points.values())


def test_only_follows_the_masks_of_each_step(model: HookedLoopMDM) -> None:
    def look(step: DenoisingStep, rec: Recording) -> None:
        masked = step.before == MASK
        counts.append(int(masked.sum()))
        _, whole = model.run_with_cache(step.before, 3, names_filter=POST, reduce=Norm())
        assert torch.equal(rec[f"{POST}@2"], whole[f"{POST}@2"][masked])

    counts: list[int] = []
    record_sampling(model, prompt(), SamplerConfig(n_steps=3, order="confidence", n_loops=3), look,
                    names_filter=POST, reduce=Norm(), only="masked")
    assert counts[0] == 21
    assert counts[0] > counts[1] > counts[2] > 0


def test_adaptive_steps_have_the_loops_that_ran(model: HookedLoopMDM) -> None:
    def look(step: DenoisingStep, rec: Recording) -> None:
        loops.append(len(rec.stack(POST)))
        assert loops[-1] == int(step.loops_used.max())
        assert rec[f"{POST}@0"].isnan().all()

    loops: list[int] = []
    record_sampling(model, prompt(), SamplerConfig(n_steps=3, n_loops=8, exit_threshold=0.9), look,
                    names_filter=POST, reduce=CosineToPrevious(), generator=torch.Generator().manual_seed(0))
    assert len(loops) == 3
    assert min(loops) < 8


def test_steps_are_streamed_to_disk_under_edits(model: HookedLoopMDM, tmp_path: Path) -> None:
    config = SamplerConfig(n_steps=3, n_loops=3)
    with edit(model, [skip_loop(1)], n_loops=3), RecordingWriter(tmp_path / "run.zarr", axis="step") as out:
        trace = record_sampling(model, prompt(), config, lambda step, rec: out.append(rec, t=step.t),
                                names_filter=POST, generator=torch.Generator().manual_seed(0))
    back = open_recording(tmp_path / "run.zarr")
    assert back.dataset[POST].dims == ("step", "loop", "batch", "pos", "d_model")
    assert back.dataset.loop.values.tolist() == [0, 2]
    assert back.dataset.t.values.tolist() == [step.t for step in trace]
    _, rec = model.run_with_cache(trace[2].before, 2, names_filter=POST)
    assert torch.equal(back.at(step=2)[f"{POST}@2"], rec[f"{POST}@1"])


def test_sites_are_checked_before_the_first_step(model: HookedLoopMDM) -> None:
    runs = model.clock.runs
    with pytest.raises(SiteError, match="cannot fire"):
        record_sampling(model, prompt(), SamplerConfig(n_loops=3), lambda step, rec: None, names_filter=f"{POST}@3")
    with pytest.raises(ValueError, match="give one of them"):
        record_sampling(model, prompt(), SamplerConfig(), lambda step, rec: None, names_filter=POST, only="masked",
                        pos_slice=slice(3))
    assert model.clock.runs == runs
