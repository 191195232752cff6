"""A folder that is not there is an error at once, and the hub is asked only for what can be on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from hooks import HookedLoopMDM
from hooks.bridges.checkpoints import load_checkpoint
from hooks.bridges.hf import LoopMDMForMaskedLM
from hooks.location import located
from hooks.topology import Topology
from studies import zoo
from tests.small import small_model, small_tokens

PATHS = ["zoo/nosuch", "zoo/automaton-lop", "./nosuch", "../nosuch", "/nosuch/model", "~/nosuch-model", "nosuch",
         "a/b/c", "a/b/", "zoo\\nosuch", "https://huggingface.co/owner/name", "owner/na me", "owner/", "..x/y"]
"""Names that lead nowhere and are no hub ids, where there is a folder zoo with automaton-loop in it."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, and home: zoo/automaton-loop is a model. Whoever asks the hub fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    small_model().save_pretrained(tmp_path / "zoo" / "automaton-loop")

    def asked(*args: Any, **options: Any) -> None:
        raise AssertionError(f"the hub was asked for {args} {options}")

    for place in ("huggingface_hub.hub_mixin.hf_hub_download", "hooks.model.hooked.hf_hub_download"):
        monkeypatch.setattr(place, asked)
    return tmp_path


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("load", [HookedLoopMDM.from_pretrained, LoopMDMForMaskedLM.from_pretrained, located])
def test_a_path_that_leads_nowhere_is_said_to_be_missing(load, name: str, folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load(name)


@pytest.mark.parametrize("name", [*PATHS, "owner/name"])
@pytest.mark.parametrize("load", [HookedLoopMDM.from_pretrained, LoopMDMForMaskedLM.from_pretrained, located, zoo.load,
                                  zoo.read_card, lambda path: load_checkpoint(path, Topology(1, 2, 1, 2))])
def test_a_path_object_is_never_a_hub_id(load, name: str, folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(Path(name))


@pytest.mark.parametrize("name", ["zoo/automaton-loop", "./zoo/automaton-loop", "~/zoo/automaton-loop",
                                  "zoo/../zoo/automaton-loop/"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_that_is_there_is_loaded_from_there(kind, name: str, folder: Path) -> None:
    tokens = small_tokens()
    expected = small_model()(tokens)
    assert (HookedLoopMDM.from_pretrained(kind(name))(tokens) == expected).all()
    assert (LoopMDMForMaskedLM.from_pretrained(kind(name))(tokens).logits == expected).all()
    assert (HookedLoopMDM.from_pretrained(folder / "zoo" / "automaton-loop")(tokens) == expected).all()


def test_the_message_names_what_is_near_and_how_to_reach_the_hub(folder: Path) -> None:
    near = r"no folder zoo/automaton-lop in .* \(near it: zoo/automaton-loop\)\. To fetch zoo/automaton-lop from"
    with pytest.raises(FileNotFoundError, match=near):
        located("zoo/automaton-lop")
    with pytest.raises(FileNotFoundError, match=r"no folder nosuch/deep/model in .*, nor a folder nosuch/deep\. A"):
        located("nosuch/deep/model")
    with pytest.raises(FileNotFoundError, match="or a hub id of the form owner/name"):
        located("automaton-loop")


def test_a_file_in_place_of_a_folder_and_a_folder_in_place_of_a_file(folder: Path) -> None:
    file = folder / "zoo" / "automaton-loop" / "model.safetensors"
    for load in (HookedLoopMDM.from_pretrained, LoopMDMForMaskedLM.from_pretrained):
        for name in (file, str(file)):
            with pytest.raises(NotADirectoryError, match=r"is a file: give the folder that holds it"):
                load(name)
    with pytest.raises(IsADirectoryError, match=r"is a folder: give the file in it"):
        load_checkpoint(file.parent, Topology(1, 2, 1, 2))


@pytest.mark.parametrize("name", ["owner/name", "albert/albert-base-v2", "ByteDance/Ouro-1.4B"])
def test_a_hub_id_goes_to_the_hub_unless_a_folder_is_called_like_its_owner(name: str, folder: Path) -> None:
    assert located(name) == name
    (folder / name.split("/")[0]).mkdir()
    with pytest.raises(FileNotFoundError, match="from the hub, start in a folder without a folder"):
        located(name)


def test_a_model_of_the_hub_is_fetched_and_one_that_cannot_be_is_not_found(
        folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fetched(repo_id: str, filename: str, **options: Any) -> str:
        asked.append(filename)
        return str(folder / "zoo" / "automaton-loop" / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download",
                        lambda repo_id, filename, **options: fetched(repo_id, filename))
    monkeypatch.setattr("hooks.model.hooked.hf_hub_download", fetched)
    assert HookedLoopMDM.from_pretrained("owner/name").config == small_model().config
    assert set(asked) == {"config.json", "model.safetensors"}

    def offline(*args: Any, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    for place in ("huggingface_hub.hub_mixin.hf_hub_download", "hooks.model.hooked.hf_hub_download"):
        monkeypatch.setattr(place, offline)
    with pytest.raises(FileNotFoundError, match="'owner/name' is neither a folder here nor a model that could"):
        HookedLoopMDM.from_pretrained("owner/name")
