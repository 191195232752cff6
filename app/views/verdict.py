"""Verdict: what the stage test says of every looped model, and what is open; and the paper's claims, judged.

Reads what `stage_test.py`, `claims.py`, `ablations.py`, `length_generalization.py`, `loops_and_steps.py` and
`noise_level.py` of studies/ wrote; computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from app import data, show
from app.figures.style import styled
from studies.questions.ablations import page as ablations_page
from studies.questions.ablations.figures import figures as ablations_figures
from studies.questions.claims.judge import Judgement
from studies.questions.claims.page import HOW_JUDGED
from studies.questions.length_generalization import page as length_page
from studies.questions.length_generalization.figures import rows_figure
from studies.questions.loops_and_steps import page as steps_page
from studies.questions.loops_and_steps.figures import figures as steps_figures
from studies.questions.noise_level import page as noise_page
from studies.questions.noise_level.figures import figures as noise_figures
from studies.questions.question_page import Drawings
from studies.questions.stage_test import page as stage_test_page
from studies.questions.stage_test.figures import figures as stage_test_figures
from studies.results import Results, made_by


def main() -> None:
    results = _chosen()
    if results.study not in PAGES:
        st.error(f"The verdict in `{results.path}` does not name its study: it was made by another version. "
                 f"Make it again with `{made_by(results.path)}`.", icon=":material/history:")
        return
    try:
        PAGES[results.study](results)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        # what is shown was read from files, which another version, or a hand, may have left incomplete
        st.error(f"The results in `{results.path}` are incomplete or damaged ({type(error).__name__}: {error}). Make "
                 f"them again with `{made_by(results.path)}`.", icon=":material/broken_image:")


def _stage_test(results: Results) -> None:
    """The headline question: the answer in words, the matrices it rests on, every subject, and what is undecided."""
    verdict = results.verdict
    if missing := {"question", "answer", "words", "open", "main", "subjects", "found"} - set(verdict):
        st.error(f"The verdict in `{results.path}` lacks {', '.join(sorted(missing))}: it was made by another version. "
                 f"Make it again with `{made_by(results.path)}`.", icon=":material/history:")
        return
    st.title(str(verdict["question"]), anchor=False)
    st.markdown(f"#### {verdict['answer']}")
    st.markdown("\n".join(f"- {sentence}" for sentence in verdict["words"]))
    rows = pd.DataFrame(stage_test_page.rows_for_table(verdict))
    _figures_and_rows(results, stage_test_figures(verdict["found"], verdict["main"]), rows)
    with st.expander("How it is measured", icon=":material/menu_book:"):
        st.markdown("\n\n".join(stage_test_page.METHOD))
    with st.expander(f"What is undecided, and why ({len(verdict['open'])})", icon=":material/help:"):
        st.markdown("\n".join(f"- {sentence}" for sentence in verdict["open"]) or "Nothing.")
    st.caption("Limits. " + " ".join(stage_test_page.LIMITS))
    _provenance(results)


def _chosen() -> Results:
    """The study to show; stops with the command that makes one where there is none."""
    found, problems = data.studies_run()
    show.problems(problems)
    if not found:
        st.title("Do the loops re-run the same stages?", anchor=False)
        st.info(f"No results in `{data.results_folder()}` yet. Make them with `make study` or "
                "`python studies/stage_test.py` (minutes on a CPU), then reload. The other pages compute live and do "
                "not need results.",
                icon=":material/science:")
        st.stop()
    with st.sidebar:
        name = st.selectbox("Study", found, key="study", bind="query-params",
                            help="Folders of results/, written by the scripts in studies/.")
    try:
        return data.load_results(name)
    except (FileNotFoundError, OSError, ValueError) as error:
        st.error(f"These results cannot be read: {error}", icon=":material/broken_image:")
        st.stop()


def _claims(results: Results) -> None:
    """The paper's claims on one group of models: judged, with estimates, and a picture of each."""
    verdict = results.verdict
    st.title("Do the paper's claims hold here?", anchor=False)
    st.caption(f"{verdict.get('task', '')}: claims of arXiv 2605.26106, tested again on "
               f"{len(verdict.get('entries', []))} models of the zoo; seeds {verdict.get('seeds', '?')}.")
    st.caption(HOW_JUDGED)
    for letter, saved in verdict["claims"].items():
        judged = Judgement.from_dict(saved)
        with st.container(border=True):
            colour = {"holds here": "green", "does not hold here": "orange"}.get(judged.word, "gray")
            st.markdown(f"**({letter})** {judged.claim} :{colour}-badge[{judged.word}]")
            if note := " ".join(filter(None, (judged.note, judged.missing))):
                st.caption(note)
            if judged.quantities:
                st.dataframe(pd.DataFrame([{"quantity": q.label, "estimate": q.estimate, "95% interval": q.interval,
                                            "over": q.over, "judged": "not judged" if q.bound is None else q.word}
                                           for q in judged.quantities]), hide_index=True, width="stretch")
            picture = results.path / f"{letter}.svg"
            if picture.exists():
                st.image(str(picture), width=760)
    _provenance(results)


def _ablations(results: Results) -> None:
    """What each change of the LoopMDM does to whether its loops settle."""
    verdict = results.verdict
    st.title(ablations_page.TITLE + "?", anchor=False)
    st.caption(f"LoopMDMs of six layers on *{verdict['task']}*, one change each, trained for the same FLOPs; "
               f"{verdict['setting']['examples']} held-out examples, every free position masked. Ranges are over "
               "training seeds; a number without one is a single run.")
    st.markdown("\n".join(f"- {sentence}" for sentence in verdict["words"]))
    st.dataframe(pd.DataFrame(ablations_page.table_rows(verdict)), hide_index=True, width="stretch",
                 column_config={"change": st.column_config.TextColumn(pinned=True)})  # the table is wider than the page
    for note in ablations_page.undefined_notes(verdict):
        st.caption(note)
    with st.expander("Definitions", icon=":material/menu_book:"):
        st.markdown("\n".join(f"- **{m['name']}**: {m['definition']}" for m in verdict["measures"].values()))
    for number, (title, (what, drawn)) in enumerate(ablations_figures(results.datasets["curves"]).items()):
        show.figure(styled(drawn, height=460), what, name=f"ablations-{number}", title=title,
                    table=partial(_every_number, results))
    _provenance(results)


def _length_generalization(results: Results) -> None:
    """How far models get on more rows of an automaton than they were trained on."""
    st.title("Can a model fill more rows than it was trained on?", anchor=False)
    st.markdown(results.verdict["words"])
    st.dataframe(length_page.table(results.datasets["curves"]), hide_index=True)
    drawn = styled(rows_figure(results.datasets["curves"]), height=460)
    drawn.update_layout(margin={"t": 84}, legend={"y": 1, "yref": "container", "yanchor": "top"})
    show.figure(drawn, length_page.WHAT,
                name="longer", title="Cells right by row", table=partial(_every_number, results))
    _provenance(results)


def _question(page: Any, table: Callable[[Mapping[str, Any]], pd.DataFrame],
              figures: Callable[[Any], Drawings], results: Results) -> None:
    """A question of the neighbouring literature: sentences, figures, a row per subject, how it is measured."""
    verdict = results.verdict
    st.title(str(verdict["question"]), anchor=False)
    st.markdown("\n".join(f"- {sentence}" for sentence in verdict["words"]))
    _figures_and_rows(results, figures(verdict["rows"]), table(verdict))
    with st.expander("How it is measured", icon=":material/menu_book:"):
        st.markdown("\n\n".join(page.METHOD))
    st.caption("Limits. " + " ".join(page.LIMITS))
    _provenance(results)


def _figures_and_rows(results: Results, drawn: Drawings, rows: pd.DataFrame) -> None:
    """The figures of a study, as high and with the legends that they were made with, and its subjects."""
    for name, (title, what, figure) in drawn.items():
        own = figure.layout.to_plotly_json()
        figure = styled(figure, height=int(own["height"])).update_layout(width=None, legend=own["legend"],
                                                                         margin=own["margin"])
        show.figure(figure, what, name=f"{results.study}-{name}", title=title, table=lambda: rows)
    st.header("Every subject", anchor=False)
    st.dataframe(rows, hide_index=True, width="stretch",
                 column_config={"subject": st.column_config.TextColumn(pinned=True)})


def _provenance(results: Results) -> None:
    st.header("Where this comes from", anchor=False)
    made = results.verdict.get("provenance", {})
    report = Path(results.path) / "report.html"
    with st.container(horizontal=True):
        if report.exists():
            st.download_button("Report", report.read_bytes, file_name=f"{results.path.name}.html", mime="text/html",
                               icon=":material/description:", on_click="ignore", key="report",
                               help="Verdict, table and figures as one page")
        st.download_button("Verdict as JSON", (results.path / "verdict.json").read_bytes, icon=":material/data_object:",
                           file_name=f"{results.path.name}.json", mime="application/json", on_click="ignore",
                           key="json")
    if made:
        seconds = float(made.get("seconds", 0))
        st.markdown(f"`{made.get('program', '')}` in {seconds:.0f} s on CPU threads: {made.get('threads', '?')}. "
                    + ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items()))
        st.dataframe(pd.DataFrame([{"model": name, "sha256 of weights": model["sha256"], "made by": model["command"]}
                                   for name, model in made.get("models", {}).items()]), hide_index=True,
                                   width="stretch")


def _every_number(results: Results) -> pd.DataFrame:
    """All measurements of a study, long: dataset, variable, coordinates, value."""
    parts = []
    for name, dataset in results.datasets.items():
        for variable, values in dataset.data_vars.items():
            part = values.rename("value").to_dataframe().reset_index()
            where = part.drop(columns="value").apply(lambda row: ", ".join(f"{k}={v}" for k, v in row.items()), axis=1)
            parts.append(pd.DataFrame({"dataset": name, "variable": variable, "at": where, "value": part["value"]}))
    return pd.concat(parts)


PAGES: dict[str, Callable[[Results], None]] = {
    "stage_test": _stage_test, "claims": _claims, "ablations": _ablations,
    "length_generalization": _length_generalization,
    "loops_and_steps": partial(_question, steps_page, steps_page.steps_table, steps_figures),
    "noise_level": partial(_question, noise_page, noise_page.noise_table, noise_figures)}
"""The page of each study."""

main()
