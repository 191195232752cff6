"""results/recipe.md: what each change of the recipe does to the NELBO, from runs of equal FLOPs paired by seed.

    text = page(runs, {"recipe": "the recipe", "before": "S uniform, …"})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from studies.questions.recipe.judge import FEWEST, Difference, Run, differences
from studies.training.evaluation import IDLE


def sentence(change: str, what: str, found: Sequence[Difference]) -> str:
    """One line on one change: where it is worse or better, and whether the recipe's choice is kept."""
    of = [difference for difference in found if difference.change == change]
    told = "; ".join(f"{d.task} at {d.budget_flops:.2g} FLOPs: {d.text}" for d in of)
    words = {d.word for d in of}
    judged = words & {"worse", "better"}
    verdict = ("differs by task" if len(judged) == 2 else "the recipe's choice is kept" if judged == {"worse"}
               else "better than the recipe's choice" if judged else "undecided" if "undecided" in words
               else "too few runs to judge")
    return f"- *{change}* ({what}): {verdict}. {told}."


def page(runs: Sequence[Run], names: Mapping[str, str]) -> str:
    """The page. ``names`` describes each change, in the order of the page."""
    found = differences(runs)
    lines = ["# The training recipe, one change at a time", "",
             "Made by `python studies/recipe.py`: LoopMDMs trained for equal FLOPs, held-out NELBO at S_max in nats "
             "per free token. Differences are change − recipe, paired by seed (which fixes the data and the initial "
             "weights), "
             f"with a 95% interval of Student's t from {FEWEST} seeds on; above 0 the recipe is better.", ""]
    lines += [sentence(change, what, found) for change, what in names.items() if any(d.change == change for d in found)]
    untested = [change for change in names if change != "recipe" and all(d.change != change for d in found)]
    if untested:
        lines.append(f"- Not run beside the recipe so far: {', '.join(untested)}.")
    lines += ["", "| task | FLOPs | change | seeds | steps | NELBO at S_max | NELBO at S = 1 | examples right | idle |",
              "|---" * 9 + "|"]
    groups: dict[tuple[str, float, str], list[Run]] = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        groups.setdefault((run["task"], run["budget_flops"], run["change"]), []).append(run)
    order = list(names)
    for task, budget, change in sorted(groups, key=lambda key: (*key[:2], order.index(key[2]))):
        group = groups[task, budget, change]
        lines.append(f"| {task} | {budget:.2g} | {change} | {', '.join(str(run['seed']) for run in group)} | "
                     f"{_range(group, 'step', '.0f')} | {_range(group, 'nelbo', '.3f')} | "
                     f"{_range(group, 'nelbo@1', '.3f')} | {_range(group, 'exact', '.2f')} | "
                     f"{sum(int(run['loops_idle']) for run in group)} of {len(group)} |")
    tasks = {run["task"]: run["difficulty"] for run in runs}
    lines += ["", *(f"- *{task}*: " + ", ".join(f"{key} {value}" for key, value in difficulty.items() if key != "name")
                    + "." for task, difficulty in sorted(tasks.items())),
              "- *examples right*: every free position masked, one forward of S_max loops. *idle*: runs whose loops "
              f"gain less than {IDLE} nat over one loop or over the straight line (`studies.training.evaluation`).",
              "- Medians over seeds, ranges in brackets."]
    return "\n".join(lines) + "\n"


def _range(group: Sequence[Run], key: str, form: str) -> str:
    values = [float(run[key]) for run in group]
    middle = format(float(np.median(values)), form)
    return middle if len(values) == 1 else f"{middle} [{min(values):{form}}, {max(values):{form}}]"
