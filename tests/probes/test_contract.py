"""Every probe on every kind of model that meets the contract, with no branch on the kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from itertools import chain

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from hooks import Unavailable, adopt, watch
from hooks.edits import patch
from probes import (
    attention_summary,
    basins,
    between_depths,
    causal_scan,
    cka_between_depths,
    classify_tokens,
    contraction,
    dynamics,
    effective_rank,
    fixed_point,
    head_kinds,
    head_scan,
    intrinsic_dimension,
    jacobian_spectrum,
    line_search,
    lyapunov,
    matrix_entropy,
    online_code,
    path_effects,
    pattern_distance,
    patterns,
    probe_latent,
    probe_loop,
    probe_values,
    read_lens,
    read_line,
    trajectory_pca,
    transfer,
)
from probes.cycles import Cycle
from probes.loop_patterns import frozen_attention, head_distances, pattern_gram
from studies.examples.architectures import HuginnLike
from tests.specimens import SPECIMENS, Mine, Specimen

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


FIXED = ("PositionsFirst", "WithoutPositions")
"""Modules whose forward runs a number of loops that nothing sets."""


@pytest.fixture(params=sorted(SPECIMENS), scope="module")
def specimen(request: pytest.FixtureRequest) -> Specimen:
    torch.manual_seed(0)
    return SPECIMENS[request.param]()


# ----------------------------------------------------------------- the contract itself


@torch.no_grad()
def test_going_on_from_any_depth_gives_the_models_answer(specimen):
    model, inputs, s = specimen.model, specimen.inputs, specimen.n_loops
    answer = model(inputs, s)
    states, logits, context = model.run(inputs, s)
    depth = model.topology(s).depth
    assert answer.ndim == 3
    assert len(states) == depth + 1
    torch.testing.assert_close(logits, answer, atol=1e-6, rtol=1e-5)
    for d in range(depth + 1):
        torch.testing.assert_close(model.resume(d, states[d], context), answer, atol=1e-5, rtol=1e-5)
    for d in range(depth):
        torch.testing.assert_close(model.apply(d, states[d], context), states[d + 1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.read(states[-1], context), answer, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_of_a_context_are_those_examples(specimen):
    model, inputs, s = specimen.model, specimen.inputs, specimen.n_loops
    states, answer, context = model.run(inputs, s)
    index = torch.tensor([4, 4, 0, 5, 4])
    for rows, chosen in ((context.rows(index), index), (context.rows(index).rows(torch.tensor([2, 0])), index[[2, 0]])):
        for d in (0, 1, len(states) // 2, len(states) - 1):
            torch.testing.assert_close(model.resume(d, states[d][chosen], rows), answer[chosen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(model.select(inputs, index), s), answer[index], atol=1e-5, rtol=1e-5)
    assert model.batch_size(inputs) == 6
    assert model.batch_size(model.select(inputs, index)) == 5


@torch.no_grad()
def test_another_state_changes_the_answer_as_an_edit_at_its_site_does(specimen):
    model, inputs, s = specimen.model, specimen.inputs, specimen.n_loops
    states, _, context = model.run(inputs, s)
    for d in (1, len(states) // 2, len(states) - 1):
        other = states[d].flip(0)
        patched = model.run_with_hooks(inputs, s, fwd_hooks=[patch(model.site(d - 1, n_loops=s), other)])
        torch.testing.assert_close(model.resume(d, other, context), patched, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(SPECIMENS))
def test_the_first_recording_of_a_new_model_is_of_its_own_forward(name):
    """Not of one of the forwards that check the model."""
    specimen = SPECIMENS[name]()
    model, inputs, s = specimen.model, specimen.inputs, specimen.n_loops
    sites = [model.site(d, n_loops=s) for d in range(model.topology(s).depth)]
    _, rec = model.run_with_cache(inputs, s, names_filter=sites)
    for site, state in zip(sites, model.run(inputs, s).states[1:], strict=True):
        torch.testing.assert_close(rec[site], state, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_recording_survives_what_is_run_on_other_states_afterwards():
    specimen = SPECIMENS["own-module"]()
    with watch(specimen.model.module, "block.hook_out", schedule={"block": 4}) as rec:
        states, _, context = specimen.model.run(specimen.inputs, 4)
        specimen.model.walk(states[2] + 1, context, 2)
    torch.testing.assert_close(rec["block.hook_out@1"], states[2])


@torch.no_grad()
def test_recordings_hold_the_states(specimen):
    model, inputs, s = specimen.model, specimen.inputs, specimen.n_loops
    states, answer, _ = model.run(inputs, s)
    sites = [model.site(d, n_loops=s) for d in range(len(states) - 1)]
    logits, rec = model.run_with_cache(inputs, s, names_filter=sites)
    torch.testing.assert_close(logits, answer, atol=1e-6, rtol=1e-5)
    for site, state in zip(sites, states[1:], strict=True):
        torch.testing.assert_close(rec[site], state, atol=1e-6, rtol=1e-5)
    stream = rec.residual_stream()
    assert stream.dims == ("depth", "batch", "pos", "d_model")
    np.testing.assert_allclose(stream.values, torch.stack(states[1:]).numpy(), atol=1e-5)


@torch.no_grad()
def test_stopping_after_a_loop_is_the_model_run_with_fewer_loops(specimen):
    model, inputs, s = specimen.model, specimen.inputs, specimen.n_loops
    if s == 1:
        with pytest.raises(ValueError, match="what would make it run 2"):
            model.topology(2)
        return
    states, _, context = model.run(inputs, s)
    for k, depths in enumerate(model.topology(s).loop_depths()):
        if k + 1 < s and model.name in FIXED:
            with pytest.raises(Unavailable, match="keyword or attribute"):
                model(inputs, k + 1)
            continue
        expected = model(inputs, k + 1)
        torch.testing.assert_close(model.coda(states[depths[-1] + 1], context), expected, atol=1e-5, rtol=1e-5)


def test_scored_positions_have_targets_or_wait_for_clean_tokens(specimen):
    scored, targets = specimen.model.scored(specimen.inputs), specimen.model.targets(specimen.inputs)
    logits = specimen.model(specimen.inputs, specimen.n_loops)
    assert scored.shape == logits.shape[:2]
    assert scored.any()
    if targets is not None:
        assert bool(((targets >= 0) == scored).all())
        assert bool((targets[:, :-1] == specimen.inputs[:, 1:]).all())
    assert all(isinstance(name, str) and name for name in specimen.model.decode(torch.tensor([1, 2])))
    assert specimen.model.name


# ------------------------------------------------------------------------ the probes


def test_lenses_end_in_the_models_own_output(specimen):
    model, inputs, s = specimen.model, specimen.inputs, specimen.n_loops
    answer = model(inputs, s).detach().log_softmax(-1)
    for kind in ("logit", "coda"):
        lens = read_lens(model, inputs, n_loops=s, kind=kind, targets=specimen.targets)
        top = model.topology(s)
        assert lens.sizes["depth"] == top.depth
        np.testing.assert_allclose(lens.kl_to_final[-1], 0, atol=1e-5)
        targets = model.targets(inputs) if specimen.targets is None else specimen.targets
        right = np.where(targets >= 0, -answer.gather(-1, targets.clamp_min(0)[..., None])[..., 0], np.nan)
        np.testing.assert_allclose(lens.nll[-1], right, atol=1e-4)
        np.testing.assert_array_equal(lens.scored, model.scored(inputs))
        assert np.isfinite(lens.entropy).all()
        if kind == "coda" and s > 1:
            try:
                fewer = model(inputs, s - 1).detach()
            except Unavailable:
                continue
            at = top.loop_depths()[-2][-1]
            np.testing.assert_array_equal(lens.prediction[at], fewer.argmax(-1))


def test_linear_probes_read_what_is_planted(specimen):
    model, inputs = specimen.model, specimen.inputs
    index = torch.arange(6).repeat_interleave(20)
    many = model.select(inputs, index)
    last = model.run(many, specimen.n_loops).states[-1].detach()
    planted = last @ torch.randn(last.shape[-1], generator=torch.Generator().manual_seed(0))
    labels = (planted > planted.median()).long()
    groups = torch.zeros(labels.shape[1], dtype=torch.long)
    found = probe_latent(model, many, labels, 2, n_loops=specimen.n_loops, groups=groups)
    assert found.accuracy.sizes["depth"] == model.topology(specimen.n_loops).depth
    assert float(found.accuracy[-1, 0]) > 0.9 > float(found.majority[-1, 0])
    with pytest.raises(ValueError, match="labels must be"):
        probe_latent(model, many, labels[:-1], 2, n_loops=specimen.n_loops, groups=groups)


def test_geometry_and_similarity_take_the_residual_stream(specimen):
    model, inputs, s = specimen.model, specimen.inputs, specimen.n_loops
    _, rec = model.run_with_cache(inputs, s, names_filter=[model.site(d, n_loops=s)
                                                           for d in range(model.topology(s).depth)])
    stream = rec.residual_stream()
    moves = dynamics(stream, rec.topology)
    assert moves.sizes["loop"] == s
    assert effective_rank(stream).shape == matrix_entropy(stream).shape == (rec.topology.depth,)
    np.testing.assert_allclose(np.diag(cka_between_depths(stream)), 1, atol=1e-6)
    assert trajectory_pca(stream, 2).coordinates.sizes["component"] == 2
    try:
        model.topology(12)
    except Unavailable:
        return
    target = fixed_point(model, inputs, n_loops=12)
    _, rec = model.run_with_cache(inputs, 12, names_filter=[model.site(d, n_loops=12)
                                                            for d in range(model.topology(12).depth)])
    moves = dynamics(rec.residual_stream(), rec.topology, fixed_point=target)
    np.testing.assert_allclose(moves.distance_to_fixed_point[-1], 0, atol=1e-6)
    assert contraction(moves.distance_to_fixed_point).law.dims == ("layer", "batch", "pos")
    assert classify_tokens(rec.residual_stream(), rec.topology).token_class.dims == ("layer", "batch", "pos")


def test_attention_where_it_can_be_had(specimen):
    model, inputs, s = specimen.model, specimen.inputs, specimen.n_loops
    if not specimen.attention:
        with pytest.raises(Unavailable, match="attention="):
            attention_summary(model, inputs, n_loops=s)
        return
    whole = patterns(model, inputs, n_loops=s)
    np.testing.assert_allclose(whole.sum("key"), 1, atol=1e-5)
    assert whole.sizes["depth"] == model.topology(s).depth
    summary = attention_summary(model, inputs, n_loops=s)
    expected = -(whole * np.log(np.maximum(whole, 1e-30))).sum("key").mean(("batch", "query"))
    np.testing.assert_allclose(summary.entropy, expected, atol=1e-4)
    distance = pattern_distance(model, inputs, n_loops=s)
    np.testing.assert_allclose(np.diag(distance.frobenius), 0, atol=1e-6)


def test_patterns_over_the_loops_of_any_model(specimen):
    model, inputs, s = specimen.model, specimen.inputs, specimen.n_loops
    cycle = Cycle(model.topology(s), tuple(model.topology(s).loop_depths()))
    if not specimen.attention:
        for measured in (partial(pattern_gram, model, inputs, cycle),
                         partial(frozen_attention, model, inputs, cycle, after=0)):
            with pytest.raises(Unavailable, match="attention="):
                measured()
        return
    gram = pattern_gram(model, inputs, cycle, chunk=4)
    whole = patterns(model, inputs, n_loops=s).isel(depth=list(chain.from_iterable(cycle.depths)))
    norms = (whole ** 2).sum(("query", "key")).transpose("batch", "depth", "head").values
    np.testing.assert_allclose(np.einsum("eaa->ea", gram.values), norms.reshape(len(norms), -1), rtol=1e-4)
    assert head_distances(gram).max() <= 1 + 1e-6
    answer = model(inputs, s).argmax(-1)
    assert torch.equal(frozen_attention(model, inputs, cycle, after=s - 1, chunk=4), answer)


# ------------------------------------------------------------------------ refusals


def test_a_fused_kernel_makes_no_pattern_and_the_error_says_how_to_get_one():
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(vocab_size=50, embedding_size=16, hidden_size=32, num_attention_heads=2, pad_token_id=0,
                          intermediate_size=64, num_hidden_layers=2, attn_implementation="sdpa")
    with pytest.raises(Unavailable, match='attn_implementation="eager"'):
        adopt(AlbertForMaskedLM(config).eval()).attention(0)


def test_a_layer_whose_attention_returns_no_pattern_says_how_to_get_one():
    model = adopt(HuginnLike().eval())
    with pytest.raises(Unavailable, match="a fused kernel makes none"):
        attention_summary(model, torch.ones(2, 5, dtype=torch.long), n_loops=2)


@torch.no_grad()
def test_a_model_that_starts_at_random_starts_from_the_same_state_each_time():
    model, tokens = adopt(HuginnLike().eval()), torch.arange(10).view(2, 5)
    states, answer, context = model.run(tokens, 3)
    torch.testing.assert_close(model(tokens, 3), answer)
    assert not torch.equal(adopt(model.module, seed=1)(tokens, 3), answer)
    index = torch.tensor([1, 0, 1])   # each row is given what its example was given
    for d in range(len(states)):
        torch.testing.assert_close(model.resume(d, states[d][index], context.rows(index)), answer[index])


@torch.no_grad()
def test_edits_in_force_take_part_in_what_is_run_by_hand(specimen):
    model, inputs, s = specimen.model, specimen.inputs, specimen.n_loops
    states, _, context = model.run(inputs, s)
    site = model.site(1, n_loops=s)
    other = states[2].flip(0)
    with model.hooks(fwd_hooks=[patch(site, other)], n_loops=s):
        edited = model.run(inputs, s)
        torch.testing.assert_close(edited.states[2], other)
        torch.testing.assert_close(model.apply(1, states[1], context), other)
        if model.topology(s).depth > 2:   # what goes on from later states does not pass the site
            torch.testing.assert_close(model.resume(2, states[2], context), model.read(states[-1], context),
                                       atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(edited.logits, model.resume(2, other, context), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("given", "message"), [
    ({}, "which modules of Mine are the layers"),
    ({"layers": ["nosuch"], "n_loops": 4}, "no module 'nosuch'"),
    ({"layers": "block", "n_loops": 4}, "layers is a list"),
    ({"layers": ["block"], "n_loops": 0}, "at least 1"),
    ({"layers": ["block"], "n_loops": "nosuch"}, "no keyword of its forward and no number called 'nosuch'"),
    ({"layers": ["block"], "schedule": {"other": 3}}, "loops none of the layers"),
    ({"layers": ["block"], "n_loops": 4, "axes": ("batch", "time")}, "axes name the layout"),
])
def test_a_declaration_that_does_not_fit_says_so(given, message):
    with pytest.raises(ValueError, match=message):
        adopt(Mine(), **given)


def test_a_wrong_number_of_loops_is_found_at_the_first_run():
    model = adopt(Mine(), layers=["block", "unembed"], n_loops=4)
    with pytest.raises(RuntimeError, match="declared to be Linear"):
        model.run(torch.ones(2, 3, dtype=torch.long))


def test_a_readout_that_is_not_the_models_own_is_refused():
    model = adopt(Mine(), layers=["block"], n_loops=4, readout=lambda state: state @ torch.ones(16, 50))
    with pytest.raises(ValueError, match="differs from what Mine answers"):
        model.run(torch.ones(2, 3, dtype=torch.long))


class SumOutside(nn.Module):
    """Adds what its block returns to a sum that the block does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.b, self.unembed = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9)

    def forward(self, tokens):
        x = self.embed(tokens)
        for _ in range(4):
            x = x + torch.tanh(self.b(x))
        return self.unembed(x)


def test_a_state_that_is_not_all_that_loops_hand_on_is_warned_of():
    tokens = torch.arange(6).view(2, 3)
    model = adopt(SumOutside(), layers=["b"], n_loops=4)
    with pytest.warns(UserWarning, match="Name the module around the sum"):
        model.enter(tokens)
    model.enter(tokens)   # once is enough, and warnings are errors here


def test_nothing_is_left_on_the_module():
    mine = Mine()
    model = adopt(mine, layers=["block"], n_loops=4)
    tokens = torch.ones(2, 3, dtype=torch.long)
    states, _, context = model.run(tokens)
    model.resume(2, states[2], context)
    with pytest.raises(ValueError, match="rows"):
        model.resume(2, states[2][:1], context)
    assert "forward" not in mine.block.__dict__
    assert not mine.block._forward_hooks
    assert not mine.block._forward_pre_hooks


def measured_by(specimen: Specimen) -> dict[str, Callable[[], xr.Dataset]]:
    """Measurements that need no fitting to a task, on twelve examples of a specimen."""
    model, s = specimen.model, specimen.n_loops
    chosen = torch.arange(12) % model.batch_size(specimen.inputs)
    inputs = model.select(specimen.inputs, chosen)
    truth = model.targets(inputs) if specimen.targets is None else specimen.targets[chosen]
    scored = model.scored(inputs).cpu()
    assert truth is not None
    labels = torch.where(scored & (truth.cpu() >= 0), truth.cpu() % 2, -1)
    _, rec = model.run_with_cache(inputs, s, names_filter=[model.site(d, n_loops=s)
                                                           for d in range(model.topology(s).depth)])
    stream = rec.residual_stream()
    of_two_loops: dict[str, Callable[[], xr.Dataset]] = {
        "probe_loop": lambda: probe_loop(model, inputs, where=torch.ones_like(scored), n_loops=s),
        "basins": lambda: basins(model, inputs, n_loops=s, n_starts=1, sizes=(0.1,)),
        "read_line": lambda: read_line(model, inputs, n_loops=s, targets=truth)}
    return {
        **(of_two_loops if model.topology(s).n_loops > 1 else {}),
        "transfer": lambda: transfer(model, inputs, labels, n_loops=s),
        "probe_values": lambda: probe_values(model, inputs, torch.rand(labels.shape), n_loops=s),
        "online_code": lambda: online_code(model, inputs, labels, 2, n_loops=s, portions=(0.5, 1.0)),
        "causal_scan": lambda: causal_scan(model, inputs, targets=truth, effects=("skip", "repeat"), n_loops=s),
        "path_effects": lambda: path_effects(model, inputs, targets=truth, n_loops=s),
        "line_search": lambda: line_search(model, inputs, targets=truth, n_loops=s),
        "between_depths": lambda: between_depths(stream),
        "intrinsic_dimension": lambda: intrinsic_dimension(stream),
        "head_kinds": lambda: head_kinds(model, inputs, n_loops=s),
        "head_scan": lambda: head_scan(model, inputs, targets=truth, n_loops=s),
        "jacobian_spectrum": lambda: jacobian_spectrum(model, inputs, n_loops=s, n_iter=8, loops=[0]),
        "lyapunov": lambda: lyapunov(model, inputs, n_loops=s, n_iter=2),
    }


MAY_BE_MISSING = {"head_kinds": "attention=", "head_scan": r"no site attn\.hook_z", "jacobian_spectrum": "gradients",
                  "lyapunov": "gradients"}
"""What a model may not be able to give, and what it says then."""


def test_every_measurement_is_made_or_named_as_missing(specimen):
    for name, measure in measured_by(specimen).items():
        missing = ""
        try:
            found = measure()
        except Unavailable as error:
            missing = str(error)
        if missing:
            assert name in MAY_BE_MISSING, (name, missing)
            assert re.search(MAY_BE_MISSING[name], missing), (name, missing)
            continue
        assert found.data_vars, name
        for key, value in found.data_vars.items():
            assert {"long_name", "units", "definition", "source"} <= set(value.attrs), (name, key)
            assert not np.isinf(value.values.astype(float)).any(), (name, key)
