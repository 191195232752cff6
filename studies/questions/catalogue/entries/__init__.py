"""Every entry of the catalogue, by family.

    ENTRIES["causal_scan"].pitfall
"""

from __future__ import annotations

from studies.questions.catalogue.entries.attention import ATTENTION
from studies.questions.catalogue.entries.causal import CAUSAL
from studies.questions.catalogue.entries.entry import CatalogueEntry
from studies.questions.catalogue.entries.geometry import GEOMETRY
from studies.questions.catalogue.entries.lenses import LENSES
from studies.questions.catalogue.entries.likeness import LIKENESS
from studies.questions.catalogue.entries.linear import PROBES
from studies.questions.catalogue.entries.stages import STAGES

ENTRIES: dict[str, CatalogueEntry] = {
    entry.key: entry for entry in (*LENSES, *PROBES, *CAUSAL, *GEOMETRY, *LIKENESS, *ATTENTION, *STAGES)}
