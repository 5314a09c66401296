"""The tables of a safety evaluation, for the console and report.md [pure]: from its summary; shares in per cent."""

from collections.abc import Mapping
from typing import Any

from configs.safety_labels import ATTACK_VECTORS, RISK_CATEGORIES
from rlhf.refusals import KINDS
from rlhf.reward_tables import NONE, Cell, ResultTable

Summary = Mapping[str, Any]
WORDS = {**RISK_CATEGORIES, **ATTACK_VECTORS, "single_turn": "single turn", "multi_turn": "multi-turn"}
PARTS = {
    "xstest_safe": "safe, look unsafe (XSTest)",
    "xstest_unsafe": "unsafe (XSTest)",
    "helpful": "other prompts",
    "risky": "risky prompts",
}
KIND_WORDS = {"refusal": "Full refusal", "partial": "Partial", "limitation": "Limitation", "compliance": "Compliance"}


def tables(summary: Summary) -> list[ResultTable]:
    """All tables that the evaluation has figures for."""
    made = [_violations(summary), *_crossed(summary), _refusals(summary), _by_type(summary), _raters(summary),
            _detector(summary), _red_team(summary), _comparison(summary)]  # fmt: skip
    return [table for table in made if table.rows]


def _share(cell: Mapping[str, Any] | None) -> Cell:
    if cell is None or cell["share"] is None:
        return NONE
    low, high = cell["ci95"]
    return f"{100 * cell['share']:.1f}", f"[{100 * low:.1f}, {100 * high:.1f}]"


def _share_of(cell: Mapping[str, Any] | None) -> Cell:
    """With the number of prompts, where no column has it."""
    return NONE if cell is None else (_share(cell)[0], f"of {cell['count']:,} {_share(cell)[1]}")


def _plain(value: Any) -> Cell:
    return f"{value:,}", ""


def _violations(summary: Summary) -> ResultTable:
    found = summary.get("violations")
    rows = []
    if found and found["all"]["count"]:
        groups = [("all", "all", found["all"])]
        groups += [(by, name, cell) for by, cells in found["by"].items() for name, cell in cells.items()]
        for by, name, cell in groups:
            counts = [_plain(cell[key]) for key in ("count", "responses", "found")]
            rows.append(([by.replace("_", " "), WORDS.get(name, name)], [*counts, _share(cell)]))
    note = f"Violation: by {summary.get('violation_by')}. Interval: Wilson's at the number of prompts."
    if found and found["not_judged"]:
        note += f" {found['not_judged']:,} responses could not be judged and are left out."
    columns = ["Prompts", "Responses", "Violations", "Violation %"]
    return ResultTable("Violations on risky prompts", ["By", "Group"], columns, rows, note)


def _crossed(summary: Summary) -> list[ResultTable]:
    made = []
    for name, table in (summary.get("violations") or {}).get("crossed", {}).items():
        columns = list(dict.fromkeys(column for cells in table.values() for column in cells))
        rows = []
        for group, cells in table.items():
            rows.append(([WORDS.get(group, group)], [_share_of(cells.get(column)) for column in columns]))
        title = f"Violation % by {name.replace('_', ' ')}"
        note = f"Cells of {summary['min_crossed_prompts']} prompts or more."
        made.append(ResultTable(title, ["Group"], [WORDS.get(column, column) for column in columns], rows, note))
    return made


def _refusals(summary: Summary) -> ResultTable:
    rows = []
    for name, found in (summary.get("refusals") or {}).items():
        cells = [_share(found["kinds"][kind]) for kind in KINDS]
        rows.append(([PARTS[name]], [_plain(found["refused"]["count"]), _share(found["refused"]), *cells]))
    note = (
        "Refused: in full or in part, by rlhf/refusals.py; on safe and other prompts these are false refusals. "
        "A limitation (not able to, does not know) counts as no refusal."
    )
    columns = ["Prompts", "Refused %", *(KIND_WORDS[kind] for kind in KINDS)]
    return ResultTable("Refusals (%)", ["Prompts"], columns, rows, note)


def _by_type(summary: Summary) -> ResultTable:
    rows = []
    for name, found in (summary.get("refusals") or {}).items():
        for kind, cell in found["by_type"].items():
            rows.append(([PARTS[name], kind.replace("_", " ")], [_plain(cell["count"]), _share(cell)]))
    return ResultTable("Refusals by type", ["Prompts", "Type"], ["Prompts", "Refused %"], rows, "Full and partial.")


def _raters(summary: Summary) -> ResultTable:
    rows = []
    for name, found in (summary.get("raters") or {}).get("agreement", {}).items():
        if found["ac"] is not None:
            interval = "" if found["ci95"] is None else f"[{found['ci95'][0]:.3f}, {found['ci95'][1]:.3f}]"
            figures = [(f"{found['ac']:.3f}", interval), (f"{100 * found['agreement']:.1f}", "")]
            rows.append(([name], [_plain(found["count"]), *figures]))
    note = "Gwet's AC1 of violation or not, AC2 of the ratings 1 to 5 with quadratic weights."
    if rows:
        note += f" Mean rating {summary['raters']['mean_rating']:.2f}."
    return ResultTable("Agreement of raters", ["Of"], ["Responses", "AC", "Agreement %"], rows, note)


def _detector(summary: Summary) -> ResultTable:
    rows = []
    for name, found in (summary.get("detector") or {}).items():
        figures = [_share(found[key]) for key in ("precision", "recall", "specificity")]
        rows.append(([name], [_plain(found["answers"]), _plain(found["refusals"]), *figures]))
    note = "A refusal: full or partial. Specificity: share of the answers that are none and are taken for none."
    columns = ["Answers", "Refusals", "Precision %", "Recall %", "Specificity %"]
    return ResultTable("Refusal detector", ["Against"], columns, rows, note)


def _red_team(summary: Summary) -> ResultTable:
    rows = []
    for name, found in (summary.get("red_team") or {}).items():
        counts = [_plain(found[key]) for key in ("persons", "attempts", "violations")]
        low, high = found["ci95"]
        persons = found["ci95_persons"]
        gamma = f"{found['gamma']:.3f}", f"[{low:.3f}, {high:.3f}]"
        between = ("", f"[{persons[0]:.3f}, {persons[1]:.3f}]") if persons else NONE
        rejected = _share(found.get("of_the_last_rejected"))
        rows.append(([name], [*counts, (f"{found['hours']:.1f}", ""), gamma, between, rejected]))
    note = (
        "Gamma: violations per person-hour, with Garwood's exact Poisson interval; beside it a bootstrap over persons. "
        "Rejected: of the prompts that broke the release before and were tried again."
    )
    columns = ["Persons", "Attempts", "Violations", "Hours", "Gamma", "Over persons", "Rejected %"]
    return ResultTable("Red team", ["Release"], columns, rows, note)


def _comparison(summary: Summary) -> ResultTable:
    found = summary.get("comparison")
    rows = []
    for name, figure in found["figures"].items() if found else ():
        paired = figure["paired"]
        change = NONE
        if paired["difference"] is not None:
            bounds = paired["ci95"]
            interval = f"[{100 * bounds[0]:+.1f}, {100 * bounds[1]:+.1f}]" if bounds else ""
            change = f"{100 * paired['difference']:+.1f}", interval
        sides = [cell for side in ("before", "after") for cell in (_plain(figure[side]["count"]), _share(figure[side]))]
        rows.append(([name], [*sides, _plain(paired["prompts"]), change]))
    note = "Difference: in points, over the prompts that are in both, with a paired bootstrap over prompts."
    for name, words in (("repaired", "broke the earlier policy and not this one"), ("broken", "broke only this one")):
        if found and found[name]["count"]:
            note += f" {words.capitalize()}: {_share(found[name])[0]} % of {found[name]['count']:,}."
    columns = ["Prompts before", "Before %", "Prompts after", "After %", "In both", "Difference"]
    return ResultTable("Before and after", ["Figure"], columns, rows, note)
