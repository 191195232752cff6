"""Pretrained models that nobody here made, looped without training, under the probes.

AntiBERTy (MIT, PyPI antiberty==0.1.3): BERT with 8 layers of width 512 for antibody sequences, 25 tokens; and
SmolLM2-135M (`studies.questions.stage_test.pretrained`). The files are too large to bundle: `make specimens` downloads
them and runs these tests.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hooks import LoopedModel, adopt, loopify
from probes import attention_summary, cka_between_depths, dynamics, fixed_point, probe_latent, read_lens
from studies.questions.stage_test.pretrained import CHAINS, RESIDUE_LAYERS, Residues, antiberty, pretrained_subjects

pytestmark = pytest.mark.pretrained
SPECIMENS = Path(__file__).resolve().parents[2] / "runs" / "specimens"
FILES = SPECIMENS / "antiberty" / "trained_models"
N_LOOPS = 2


@pytest.fixture(scope="module")
def chains() -> tuple[torch.Tensor, torch.Tensor]:
    """(masked tokens, clean tokens), every seventh residue masked."""
    length = min(map(len, CHAINS))
    clean = torch.tensor([Residues(FILES).encode(chain[:length]) for chain in CHAINS])
    masked = clean.clone()
    masked[:, 3:-1:7] = Residues(FILES).mask_token_id
    return masked, clean


@pytest.fixture(scope="module")
def model() -> LoopedModel:
    unlooped = antiberty(FILES)
    loopify(unlooped, RESIDUE_LAYERS, N_LOOPS)
    return adopt(unlooped, tokenizer=Residues(FILES))


@torch.no_grad()
def test_it_still_reads_antibodies_when_its_middle_runs_twice(model, chains):
    masked, clean = chains
    scored = model.scored(masked)
    for n_loops in (1, N_LOOPS):
        right = (model(masked, n_loops).argmax(-1) == clean)[scored].float().mean()
        assert right > 0.8, n_loops
    assert "".join(model.decode(clean[0][1:5])) == CHAINS[0][:4]


@torch.no_grad()
def test_lenses(model, chains):
    masked, clean = chains
    answer = model(masked, N_LOOPS)
    fewer = model(masked, 1)
    for kind in ("logit", "coda"):
        lens = read_lens(model, masked, n_loops=N_LOOPS, kind=kind, targets=clean)
        np.testing.assert_array_equal(lens.prediction[-1], answer.argmax(-1))
        np.testing.assert_allclose(lens.kl_to_final[-1], 0, atol=1e-5)
    at = model.topology(N_LOOPS).loop_depths()[0][-1]
    np.testing.assert_array_equal(lens.prediction[at], fewer.argmax(-1))


@torch.no_grad()
def test_the_other_probes(model, chains):
    masked, clean = chains
    summary = attention_summary(model, masked, n_loops=N_LOOPS)
    assert summary.entropy.shape == (model.topology(N_LOOPS).depth, 8)
    sites = [model.site(depth, n_loops=N_LOOPS) for depth in range(model.topology(N_LOOPS).depth)]
    _, rec = model.run_with_cache(masked, N_LOOPS, names_filter=sites)
    stream = rec.residual_stream()
    assert dynamics(stream, rec.topology).step_relative.isel(loop=1).min() > 0
    np.testing.assert_allclose(np.diag(cka_between_depths(stream)), 1, atol=1e-6)
    assert fixed_point(model, masked, n_loops=4).sizes["layer"] == 2
    many = model.select(masked, torch.arange(2).repeat_interleave(8))
    hydrophobic = torch.isin(clean, torch.tensor([Residues(FILES).names.index(r) for r in "AVILMFWY"])).long()
    labels = hydrophobic[torch.arange(2).repeat_interleave(8)]
    found = probe_latent(model, many, labels, 2, n_loops=N_LOOPS, groups=torch.zeros(labels.shape[1], dtype=torch.long))
    assert float(found.accuracy[-1, 0]) > float(found.majority[-1, 0])


@torch.no_grad()
def test_a_causal_language_model_still_reads_english_when_its_middle_runs_three_times():
    subject = {subject.name: subject for subject in pretrained_subjects(SPECIMENS)[0]}["SmolLM2"]
    model, = subject.load()
    drawn = subject.examples(4, 0, (1.0,))
    for n_loops in (1, subject.n_loops):
        answer = model(drawn.inputs, n_loops)
        nll = torch.nn.functional.cross_entropy(answer[drawn.scored], drawn.targets[drawn.scored])
        assert nll < 0.6 * np.log(answer.shape[-1]), n_loops
    lens = read_lens(model, drawn.inputs, n_loops=subject.n_loops, kind="coda")
    np.testing.assert_array_equal(lens.prediction[-1], answer.argmax(-1))
    at = model.topology(subject.n_loops).loop_depths()[0][-1]
    np.testing.assert_array_equal(lens.prediction[at], model(drawn.inputs, 1).argmax(-1))
