"""The tables of a persistence measurement, policies side by side: as data and for the console [pure]."""

from collections.abc import Mapping
from typing import Any

from rlhf.reward_tables import NONE, Cell, ResultTable, share_cell

POLICIES = ("baseline", "trained")
SHOWN_TURNS = (2, 4, 6, 10, 20)  # the paper's Table 30 has 2, 4, 6 and 20


def table_30(summary: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """{turn: {"baseline": {"seen": {"share", "ci95"}, "unseen": ...}, "trained": ...}} at the turns of Table 30.

    Beside turns 2, 4, 6, 10 and 20 a row "1-20" (or as far as dialogues went) with the mean over turns, and "last" with
    the last turn of each dialogue. Turns that no dialogue was to have are left out.
    """
    columns = _columns(summary)
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for (policy, values), table in columns.items():
        cells = {
            str(t): {"share": table[str(t)], "ci95": table["ci95"][str(t)]} for t in SHOWN_TURNS if str(t) in table
        }
        cells |= {"1-20": _mean(next(iter(table["mean"].values()), None)), "last": table["last_turn"] or _nothing()}
        for row, cell in cells.items():
            kept = {"share": cell["share"], "ci95": cell["ci95"]}
            rows.setdefault(row, {}).setdefault(policy, {})[values] = kept
    return rows


def tables(summary: Mapping[str, Any]) -> list[ResultTable]:
    """Table 30, by kind, changes of the instruction, and how far helpfulness moves; those that were measured."""
    made = [_by_turn(summary), _by_kind(summary), _changes(summary), _helpfulness(summary)]
    return [table for table in made if table.rows]


def _columns(summary: Mapping[str, Any]) -> dict[tuple[str, str], Mapping[str, Any]]:
    """(policy, "seen" or "unseen") -> its table."""
    found = {}
    for policy in POLICIES:
        if policy in summary:
            found[policy, "seen"] = summary[policy]
            if "unseen" in summary[policy]:
                found[policy, "unseen"] = summary[policy]["unseen"]
    return found


def _span(columns: Mapping[tuple[str, str], Any]) -> str:
    """The turns that means are over, "1 to 20" unless dialogues were shorter."""
    return next((next(iter(table["mean"])) for table in columns.values() if table["mean"]), "1-20").replace("-", " to ")


def _named(columns: Mapping[tuple[str, str], Any]) -> list[str]:
    return [policy + (", values never taught" if values == "unseen" else "") for policy, values in columns]


def _by_turn(summary: Mapping[str, Any]) -> ResultTable:
    columns, made = _columns(summary), table_30(summary)
    names = {"1-20": f"mean of turns {_span(columns)}", "last": "last turn of each dialogue"}
    rows = [
        ([names.get(row, row)], [share_cell(made[row].get(policy, {}).get(values)) for policy, values in columns])
        for row in sorted(made, key=lambda row: (not row.isdigit(), row.isdigit() and int(row)))
    ]
    note = "Per cent of replies that obey the instruction of the first turn, with 95 % intervals."
    return ResultTable("Table 30: how long an instruction holds", ["turn"], _named(columns), rows, note)


def _by_kind(summary: Mapping[str, Any]) -> ResultTable:
    columns = _columns(summary)
    kinds = sorted({kind for table in columns.values() for kind in table["by_kind_mean"]})
    rows = [
        ([kind], [share_cell(_mean(_first(table["by_kind_mean"].get(kind)))) for table in columns.values()])
        for kind in kinds
    ]  # fmt: skip
    note = f"Per cent of replies of turns {_span(columns)} that obey; the intervals take the dialogue as their unit."
    return ResultTable(f"By kind of instruction, turns {_span(columns)}", ["kind"], _named(columns), rows, note)


def _changes(summary: Mapping[str, Any]) -> ResultTable:
    columns = {key: table for key, table in _columns(summary).items() if table.get("change")}
    changes = [table["change"] for table in columns.values()]
    rows = []
    if changes:
        rows = [
            (["the first, before the change"], [share_cell(_mean(change["old_before"])) for change in changes]),
            (["the first, after it"], [share_cell(_mean(change["old_after"])) for change in changes]),
            (["the new one"], [share_cell(_mean(_first(change["new"]["mean"]))) for change in changes]),
            (["the new one, at its own turn"], [share_cell(_at(change["new"], "1")) for change in changes]),
            (["the new one, last turn"], [share_cell(change["new"]["last_turn"]) for change in changes]),
        ]
    title = f"Another instruction at turn {changes[0]['turn']}" if changes else ""
    note = "Per cent of replies that obey each of the two; after a complete change the first shows in none."
    return ResultTable(title, ["which is obeyed"], _named(columns), rows, note)


def _helpfulness(summary: Mapping[str, Any]) -> ResultTable:
    rows = []
    for name, found in (summary.get("helpfulness_change") or {}).items():
        rows.append(([f"{name}: no instruction, baseline to trained"], _moved(found)))
    for policy in POLICIES:
        for values, found in ((summary.get(policy) or {}).get("helpfulness_under_instruction") or {}).items():
            rows.append(([f"gold: {policy}, {values} instruction against none"], _moved(found)))
    note = "Mean over dialogues; the interval is a paired bootstrap over dialogues."
    return ResultTable("How far helpfulness moves", ["measure"], ["before", "after", "change"], rows, note)


def _moved(found: Mapping[str, Any] | None) -> list[Cell]:
    if found is None:
        return [NONE] * 3
    low, high = found["ci95"]
    return [(f"{found['before']:.3f}", ""), (f"{found['after']:.3f}", ""),
            (f"{found['change']:+.3f}", f"[{low:+.3f}, {high:+.3f}]")]  # fmt: skip


def _at(table: Mapping[str, Any], turn: str) -> dict[str, Any]:
    return {"share": table[turn], "ci95": table["ci95"][turn]}


def _first(ranges: Mapping[str, Any] | None) -> Any:
    return next(iter(ranges.values()), None) if ranges else None


def _mean(found: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"share": found["mean"], "ci95": [found["low"], found["high"]]} if found else _nothing()


def _nothing() -> dict[str, Any]:
    return {"share": None, "ci95": [0.0, 1.0]}
