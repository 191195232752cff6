"""Every example runs as a script, from anywhere, without a network, prints what it promises, and answers --help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from studies.examples import architectures

EXAMPLES = Path(__file__).resolve().parents[2] / "studies" / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name not in ("architectures.py", "__init__.py"))


def started(name: str, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script from another folder, offline and with a module cache of its own; warnings are errors."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache"),
                   "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run([sys.executable, "-W", "error", str(EXAMPLES / name), *arguments], capture_output=True,
                          text=True, cwd=tmp_path, env=environment, check=False)


def run(name: str, tmp_path: Path, *arguments: str) -> list[str]:
    done = started(name, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow  # each loads torch, most transformers too
@pytest.mark.parametrize(("name", "n_lines", "last"), [
    ("ouro.py", 4, r"loop 3: 100% of tokens as in the last loop, exit gate 0\.\d\d"),
    ("huginn.py", 15, r"loop 15: relative step \d\.\d{4}, from the last state 0\.0000"),
    ("hrm_text.py", 7, r"h1:    H state to the cosine of -?\d\.\d{3} .*"),
    ("albert.py", 7, r"with the state zeroed after loop 3: +\d+%"),
    ("loopified_llama.py", 3, r"layers 2 to 3, 4 loops: KL from the original \d\.\d{4}, state moved by .*"),
])
def test_an_example_runs(name, n_lines, last, tmp_path):
    lines = run(name, tmp_path)
    assert len(lines) == n_lines
    assert re.fullmatch(last, lines[-1]), lines[-1]
    numbers = re.findall(r"\d+\.\d+", "\n".join(lines))
    assert all(float(number) < 1e3 for number in numbers)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_an_example_explains_itself_and_names_a_folder_that_is_not_there(name, tmp_path):
    text = "\n".join(run(name, tmp_path, "--help"))
    assert re.match(rf"usage: \S*{re.escape(name)} \[-h\] \[SOURCE\]\n", text)
    first = (EXAMPLES / name).read_text().removeprefix('"""').splitlines()[0]
    assert first in " ".join(text.split())
    assert f"python studies/examples/{name}" in text
    (tmp_path / "zoo").mkdir()
    done = started(name, tmp_path, "zoo/nosuch")
    assert done.returncode != 0
    assert "FileNotFoundError: there is no folder" in done.stderr.splitlines()[-1], done.stderr


_RELEASE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from studies.examples.architectures import {stand_in}

class ReleasedConfig(PretrainedConfig):
    model_type = "released"

class Released(PreTrainedModel):
    config_class = ReleasedConfig

    def __init__(self, config):
        super().__init__(config)
        inner = {stand_in}()
        for name, child in inner.named_children():
            self.add_module(name, child)
        self.own_forward = [type(inner).forward, inner.config]
        config.mean_recurrence, config.total_ut_steps, config.vocab_size = 4, 4, 50
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, num_steps=None):
        if num_steps is None:
            return self.own_forward[0](self, input_ids)
        if hasattr(num_steps, "__len__") and len(num_steps) > 1:   # as Huginn's authors write it
            first, second = num_steps
        else:
            first, second = num_steps, torch.tensor(0)
        return self.own_forward[0](self, input_ids, num_steps=first + second)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "stand_in", "n_lines"), [("huginn.py", "HuginnLike", 15), ("ouro.py", "OuroLike", 4)])
def test_an_example_runs_a_releases_own_code(name, stand_in, n_lines, tmp_path):
    """A folder as the hub gives it: weights, and a Python file that is trusted on request."""
    folder = tmp_path / "release"
    folder.mkdir()
    (folder / "modeling_released.py").write_text(_RELEASE.format(stand_in=stand_in))
    (folder / "config.json").write_text(json.dumps({
        "model_type": "released", "architectures": ["Released"], "auto_map": {
            "AutoConfig": "modeling_released.ReleasedConfig", "AutoModelForCausalLM": "modeling_released.Released"}}))
    save_file(getattr(architectures, stand_in)().state_dict(), folder / "model.safetensors", {"format": "pt"})
    lines = run(name, tmp_path, str(folder))
    assert len(lines) == n_lines
    assert lines[-1].startswith(f"loop {n_lines if name == 'huginn.py' else n_lines - 1}")


def test_every_example_is_run():
    assert SCRIPTS == ["albert.py", "hrm_text.py", "huginn.py", "loopified_llama.py", "ouro.py"]
    for name in SCRIPTS:
        code = [line for line in (EXAMPLES / name).read_text().split('"""')[2].splitlines() if line.strip()]
        assert len(code) <= 36, f"{name} is an example, to be read at one glance"
