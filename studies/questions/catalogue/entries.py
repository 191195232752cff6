"""Every entry of the catalogue, by family.

    ENTRIES["causal_scan"].pitfall
"""

from __future__ import annotations

from studies.questions.catalogue.attention import ATTENTION
from studies.questions.catalogue.causal import CAUSAL
from studies.questions.catalogue.entry import Entry
from studies.questions.catalogue.geometry import GEOMETRY
from studies.questions.catalogue.lenses import LENSES
from studies.questions.catalogue.likeness import LIKENESS
from studies.questions.catalogue.linear import PROBES
from studies.questions.catalogue.stages import STAGES

ENTRIES: dict[str, Entry] = {entry.key: entry for entry in (*LENSES, *PROBES, *CAUSAL, *GEOMETRY, *LIKENESS, *ATTENTION,
                                                            *STAGES)}
