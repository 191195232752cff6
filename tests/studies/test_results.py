"""Bundled results and what they say of their making."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from studies.results import RESULTS, provenance

ELSEWHERE = re.compile(r'(?:^|["\s=(])(/(?:tmp|home|root|work|Users|var|mnt)/[^\s"]+)')
"""A path of somebody's machine."""


@dataclass(frozen=True)
class Settings:
    inside: Path
    outside: Path
    results: Path


@pytest.mark.parametrize("folder", [RESULTS, RESULTS.parent / "zoo"], ids=lambda folder: folder.name)
def test_no_bundled_file_holds_a_path_of_somebodys_machine(folder: Path) -> None:
    texts = [path for path in folder.rglob("*") if path.suffix in (".json", ".md") and path.is_file()]
    assert texts
    for path in texts:
        assert not (found := ELSEWHERE.search(path.read_text())), f"{path} names {found and found[1]}"


def test_provenance_names_files_within_the_project_and_no_folder_of_results(monkeypatch: pytest.MonkeyPatch) -> None:
    root = RESULTS.parent
    monkeypatch.setattr(sys, "argv", ["/x/studies/claims.py", "--results", "/tmp/r", "--zoo=/tmp/z", "--seed", "3"])
    made = provenance(Settings(root / "zoo" / "codecs", Path("/data/x"), Path("/tmp/r")), [], seconds=1.0)
    assert made["program"] == "python studies/claims.py --seed 3"
    assert made["settings"] == {"inside": "zoo/codecs", "outside": "/data/x"}
    assert not ELSEWHERE.search(json.dumps(made).replace("/data/x", ""))
