"""Verdict: what was measured on the headline question, and what is open; and the paper's claims, judged.

Reads what `rerun.py`, `claims.py`, `ablations.py` and `length_generalization.py` of studies/ wrote; computes nothing.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app import data, show
from app.figures.style import styled
from app.figures.verdict import evidence
from studies.questions.ablations import page as ablations_page
from studies.questions.ablations.figures import figures as ablations_figures
from studies.questions.claims.judge import Judgement
from studies.questions.claims.page import HOW_JUDGED
from studies.questions.length_generalization import page as length_page
from studies.questions.length_generalization.figures import rows_figure
from studies.questions.stages import page as stages_page
from studies.questions.stages.judge import cell_text, notes
from studies.results import Results, made_by

SECTIONS = {"operation": "Does the operation repeat?", "content": "Does the content advance?"}
BADGES = {"advances": "blue", "does not advance": "orange"}
"""Colours of what was decided; grey is what was not."""


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


def _stages(results: Results) -> None:
    """The headline question: its two halves, what is decided of them, and what was measured."""
    verdict = results.verdict
    missing = {"question", "conclusion", "operation", "content", "subjects", "setting", "table"} - set(verdict)
    missing |= {f"{section}.decision" for section in set(SECTIONS) & set(verdict)
                if "decision" not in verdict[section]}
    if missing:
        st.error(f"The verdict in `{results.path}` lacks {', '.join(sorted(missing))}: it was made by another version. "
                 "Make it again with `python studies/rerun.py`.", icon=":material/history:")
        return
    st.title(str(verdict["question"]), anchor=False)
    st.markdown(f"#### {verdict['conclusion']}")
    st.caption(_setting(verdict))
    for column, (section, title) in zip(st.columns(2), SECTIONS.items(), strict=True):
        with column.container(border=True, height="stretch"):
            decision = verdict[section]["decision"]
            st.markdown(f"**{title}** :{BADGES.get(decision, 'gray')}-badge[{decision}]")
            st.write(verdict[section].get("words", ""))
    if verdict.get("over_seeds"):
        st.info(verdict["over_seeds"], icon=":material/casino:")
    _evidence(verdict)
    _figures(results)
    _provenance(results)


def _chosen() -> Results:
    """The study to show; stops with the command that makes one where there is none."""
    found, problems = data.studies_run()
    show.problems(problems)
    if not found:
        st.title("Do the loops re-run the same stages?", anchor=False)
        st.info(f"No results in `{data.results_folder()}` yet. Make them with `make study` or "
                "`python studies/rerun.py` (minutes on a CPU), then reload. The other pages compute live and do "
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


def _setting(verdict: dict[str, Any]) -> str:
    setting = verdict.get("setting", {})
    task = setting.get("task", {})
    difficulty = ", ".join(f"{key} {value}" for key, value in task.items() if key != "name")
    return (f"Task *{task.get('name', '?')}* ({difficulty}), {setting.get('examples', '?')} held-out examples, noise "
            f"level t = {setting.get('t', '?')}, {setting.get('n_loops', '?')} loops compared, beside the unlooped "
            f"deep twin cut into pseudo-loops and {verdict['subjects'].get('untrained', 'untrained LoopMDMs')}.")


def _evidence(verdict: dict[str, Any]) -> None:
    st.header("What was measured", anchor=False)
    subjects, table = verdict["subjects"], verdict["table"]
    for section, column in zip(SECTIONS, st.columns(2, gap="large"), strict=True):
        chosen = [row for row in table if row.get("section", "operation") == section
                  and any("value" in row.get(subject, {}) for subject in subjects)]
        if chosen:
            with column:
                show.figure(evidence(chosen, subjects), "Each strip is one measure on its own axis: the LoopMDM and "
                            "the deep twin with 95% bootstrap intervals over held-out examples, the untrained models "
                            "one by one, with their mean. The dotted line is 0, or 1 for ratios.",
                            name=f"evidence-{section}", title=section.capitalize(),
                            table=partial(_plain_table, chosen, subjects))
    with st.expander("The same as a table, with definitions", icon=":material/table:"):
        shown = pd.DataFrame([{
            "measure": row["measure"], **{name: cell_text(row.get(s)) for s, name in subjects.items()},
            "definition": row.get("definition", "")} for row in table])
        st.dataframe(shown, hide_index=True, width="stretch",
                     column_config={"definition": st.column_config.TextColumn(width="large")})
    for note in notes(verdict):
        st.caption(note)


def _figures(results: Results) -> None:
    st.header("In detail", anchor=False)
    try:
        drawn = stages_page.figures(results.verdict, results.datasets)
    except KeyError as error:
        st.warning(f"Some measurements of this study are missing ({error}): it was made by another version. Make it "
                   "again with `python studies/rerun.py`.", icon=":material/history:")
        return
    halves: list[DeltaGenerator] = []   # columns still free beside the last figure
    for i, (title, what, figure) in enumerate(drawn):
        if _only_intervals(figure):   # shown as evidence above
            continue
        wide = len(list(figure.select_xaxes())) > 1 or i == 0
        if not wide and not halves:
            halves = list(st.columns(2, gap="large"))
        if wide:
            halves = []
        with st.container() if wide else halves.pop(0):
            show.figure(styled(figure, height=int(figure.layout.height or 380)), what, name=f"study-{i}", title=title,
                        table=lambda: _every_number(results))


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


def _only_intervals(figure: go.Figure) -> bool:
    """Is this one of the report's figures of values from the table?"""
    return all(trace.type == "scatter" and trace.error_x.array is not None for trace in figure.data)


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
        st.markdown(f"`{made.get('program', '')}` in {seconds:.0f} s on {made.get('threads', '?')} threads. "
                    + ", ".join(f"{name} {version}" for name, version in made.get("versions", {}).items()))
        st.dataframe(pd.DataFrame([{"model": name, "sha256 of weights": model["sha256"], "made by": model["command"]}
                                   for name, model in made.get("models", {}).items()]), hide_index=True,
                                   width="stretch")


def _plain_table(rows: list[dict[str, Any]], subjects: dict[str, str]) -> pd.DataFrame:
    ends = ("value", "low", "high")
    return pd.DataFrame([{"measure": row["measure"], "subject": name, **{end: row[s].get(end) for end in ends},
                          "definition": row.get("definition", "")}
                         for row in rows for s, name in subjects.items() if s in row])


def _every_number(results: Results) -> pd.DataFrame:
    """All measurements of a study, long: dataset, variable, coordinates, value."""
    parts = []
    for name, dataset in results.datasets.items():
        for variable, values in dataset.data_vars.items():
            part = values.rename("value").to_dataframe().reset_index()
            where = part.drop(columns="value").apply(lambda row: ", ".join(f"{k}={v}" for k, v in row.items()), axis=1)
            parts.append(pd.DataFrame({"dataset": name, "variable": variable, "at": where, "value": part["value"]}))
    return pd.concat(parts)


PAGES = {"stages": _stages, "claims": _claims, "ablations": _ablations,
         "length_generalization": _length_generalization}
"""The page of each study."""

main()
