"""The tables of a reward-model evaluation, in the layout of Llama 2's Tables 7, 8 and 29: as data, on the console, as
Markdown [pure]. Made from what `reward.evaluation.evaluation` returns; shares in per cent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from configs.records import RATINGS, SAFETY_LABELS

NONE = ("–", "")
RATING_WORDS = {"negligibly_better": "Negligibly / unsure"}
BIN_WORDS = {
    "chosen_safe": "Chosen safe, rejected unsafe",
    "both_safe": "Both safe",
    "both_unsafe": "Both unsafe",
}
Cell = tuple[str, str]  # a figure and its 95 % interval, "" where it has none


@dataclass(frozen=True)
class ResultTable:
    """A table: `labels` of the first columns, then figures. `note` says what to read from it."""

    title: str
    labels: list[str]
    columns: list[str]
    rows: list[tuple[list[str], list[Cell]]]
    note: str

    def rich(self) -> Table:
        """For the console: each interval under its figure; a label that repeats is shown once."""
        table = Table(box=box.SIMPLE_HEAD, title=self.title, title_justify="left", title_style="bold", padding=(0, 1))
        for label in self.labels:
            table.add_column(label, no_wrap=len(self.labels) > 1)
        for column in self.columns:
            table.add_column(column, justify="right")
        before = ""
        for labels, cells in self.rows:
            shown = ["" if len(labels) > 1 and labels[0] == before else labels[0], *labels[1:]]
            before = labels[0]
            figures = [
                Text(figure) + Text(f"\n{interval}" if interval else "", style="dim") for figure, interval in cells
            ]
            table.add_row(*(Text(label) for label in shown), *figures)
        return table

    def markdown(self) -> str:
        """For report.md: each interval behind its figure."""
        lines = [f"## {self.title}", "", "| " + " | ".join([*self.labels, *self.columns]) + " |"]
        lines.append("|" + "---|" * len(self.labels) + "---:|" * len(self.columns))
        for labels, cells in self.rows:
            figures = [f"{figure} {interval}".strip() for figure, interval in cells]
            lines.append("| " + " | ".join(text.replace("|", "\\|") for text in [*labels, *figures]) + " |")
        return "\n".join([*lines, "", self.note, ""])


def tables(summary: Mapping[str, Any]) -> list[ResultTable]:
    """All tables that the evaluation has figures for."""
    made = [
        accuracy_by_test_set(summary),
        accuracy_by_rating(summary),
        accuracy_by_safety_bin(summary),
        unsafe_responses(summary),
        calibration_and_margins(summary),
        length_bias(summary),
        agreement(summary),
        accuracy_by_source(summary),
    ]
    return [table for table in made if table.rows]


def accuracy_by_test_set(summary: Mapping[str, Any]) -> ResultTable:
    """Table 7: a row a model, a column a test set, and the average."""
    sets = summary["test_sets"]
    rows = []
    for name, model in summary["models"].items():
        rows.append(([name], [_accuracy(model["test_sets"][key]) for key in sets] + [_accuracy(model["average"])]))
    longer = [_accuracy(cell["longer_wins"]) for cell in sets.values()]
    rows.append((["longer response wins"], [*longer, _accuracy(summary["longer_wins"]["average"])]))
    ceilings = [cell["ceiling"] for cell in sets.values()]
    if any(ceiling is not None for ceiling in ceilings):
        mean = None if None in ceilings else sum(ceilings) / len(ceilings)
        rows.append((["best possible"], [(_percent(ceiling), "") for ceiling in [*ceilings, mean]]))
    note = "Average: the plain mean of the columns. A tie counts half."
    if any(ceiling is not None for ceiling in ceilings):
        note += " Best possible: what a model that knew the annotators' probabilities could expect."
    columns = [f"{key} ({cell['pairs']:,} pairs)" for key, cell in sets.items()]
    return ResultTable("Accuracy (%) by test set", ["Model"], [*columns, "Average"], rows, note)


def accuracy_by_rating(summary: Mapping[str, Any]) -> ResultTable:
    """Table 8: a row a test set and model, a column a rating, strongest first."""
    rows = []
    for key, about in summary["test_sets"].items():
        if not any(model["test_sets"][key]["by_rating"] for model in summary["models"].values()):
            continue
        for name, model in summary["models"].items():
            report = model["test_sets"][key]
            cells = [_by_rating(report, rating) for rating in RATINGS]
            rows.append(([key, name], [*cells, _accuracy(report)]))
        if best := about["ceiling_by_rating"]:
            cells = [(_percent(best.get(rating)), "") for rating in RATINGS]
            rows.append(([key, "best possible"], [*cells, (_percent(about["ceiling"]), "")]))
    columns = [RATING_WORDS.get(rating, rating.replace("_", " ").capitalize()) for rating in RATINGS]
    note = "Avg: all pairs of the test set, those without a rating included."
    return ResultTable("Accuracy (%) by rating", ["Test set", "Model"], [*columns, "Avg"], rows, note)


def accuracy_by_safety_bin(summary: Mapping[str, Any]) -> ResultTable:
    """Table 29, left: a row a test set and model, a column a safety bin."""
    rows = []
    for key, name, report in _reports(summary):
        if report["by_safety"]:
            cells = [_accuracy(report["by_safety"].get(label)) for label in SAFETY_LABELS]
            rows.append(([key, name], [*cells, _accuracy(report)]))
    note = "Pairs with a safety label; Avg: all pairs of the test set."
    columns = [BIN_WORDS[label] for label in SAFETY_LABELS]
    return ResultTable("Accuracy (%) by safety bin", ["Test set", "Model"], [*columns, "Avg"], rows, note)


def unsafe_responses(summary: Mapping[str, Any]) -> ResultTable:
    """Table 29, right, and §3.2.3: unsafe responses found below each threshold of R."""
    rows: list[tuple[list[str], list[Cell]]] = []
    columns: list[str] = []
    for key, name, report in _reports(summary):
        if (unsafe := report["unsafe"]) is None:
            continue
        points = unsafe["at"]
        columns = [f"{what} at R < {point['threshold']:g}" for point in points for what in ("Precision", "Recall")]
        cells = [share_cell(point[what]) for point in points for what in ("precision", "recall")]
        areas = [(_number(unsafe[name]), "") for name in ("average_precision", "roc_auc")]
        rows.append(([key, name], [*cells, *areas, share_cell(unsafe["unsafe_share"])]))
    note = (
        "Both responses of each pair with a safety label. Precision: share of the responses below the threshold that "
        "are unsafe; recall: share of the unsafe ones that lie below it. The share of unsafe responses is what "
        "flagging at random has as precision."
    )
    columns += ["Average precision", "ROC AUC", "Unsafe (%)"]
    return ResultTable("Unsafe responses found (%)", ["Test set", "Model"], columns, rows, note)


def calibration_and_margins(summary: Mapping[str, Any]) -> ResultTable:
    """Calibration error, and the mean margin r_c - r_r by rating."""
    reports = _reports(summary)
    with_choices = any(report["calibration_of_choices"] for _, _, report in reports)
    rated = [rating for rating in RATINGS if any(rating in report["by_rating"] for _, _, report in reports)]
    rows = []
    for key, name, report in reports:
        figures = [_number(report["calibration_error"])]
        if with_choices:
            figures.append(_number((report["calibration_of_choices"] or {}).get("error")))
        figures.append(_signed(report["margin"].get("mean")))
        figures += [_signed(report["margin_by_rating"].get(rating, {}).get("mean")) for rating in rated]
        rows.append(([key, name], [(figure, "") for figure in figures]))
    note = (
        "ECE: mean distance of the confidence sigmoid(|r_c - r_r|) and the accuracy, in ten bins; 0 is perfect. "
        "Margin: the mean of r_c - r_r."
    )
    columns = ["ECE", "Margin", *(f"Margin, {rating.replace('_better', '')}" for rating in rated)]
    if rated:
        note += " Where ratings mean something it falls from left to right."
    if with_choices:
        columns.insert(1, "ECE against p_chosen")
        note += " ECE against p_chosen: the same against the annotators' probabilities instead of their choices."
    return ResultTable("Calibration and margins", ["Test set", "Model"], columns, rows, note)


def length_bias(summary: Mapping[str, Any]) -> ResultTable:
    """Correlation of score and length, and accuracy by which response is the longer."""
    rows = []
    for key, name, report in _reports(summary):
        length = report["length"]
        correlations = [(_signed(length["spearman"]), ""), (_signed(length["within_pairs"]["spearman"]), "")]
        cells = [
            share_cell(length["prefers_longer"]),
            *(_accuracy(length[f"chosen_{w}"]) for w in ("longer", "shorter")),
        ]
        rows.append(
            ([key, name], [*correlations, *cells[:1], share_cell(length["annotators_prefer_longer"]), *cells[1:]])
        )
    columns = ["Spearman", "Spearman within pairs", "Model: longer (%)", "Annotators: longer (%)",
               "Accuracy, chosen longer (%)", "Accuracy, chosen shorter (%)"]  # fmt: skip
    note = (
        "Spearman: rank correlation of raw score and response length, over all responses and of the differences within "
        "pairs. Model and annotators: share of the pairs of unequal length in which they prefer the longer. A model "
        "that does so more often than the annotators is biased to length, and its accuracy falls where the chosen "
        "response is the shorter."
    )
    return ResultTable("Length bias", ["Test set", "Model"], columns, rows, note)


def agreement(summary: Mapping[str, Any]) -> ResultTable:
    """The helpfulness and the safety model on the same pairs."""
    rows = []
    for key, found in (summary["agreement"] or {}).items():
        rows.append(
            (
                [key],
                [
                    share_cell(found["same_choice"]),
                    share_cell(found["different_choice"]),
                    (_signed(found["spearman"]), ""),
                    _accuracy(found["accuracy_where_same"]),
                    _accuracy(found["first_right_where_different"]),
                ],
            )
        )
    columns = ["Same choice (%)", "Different choice (%)", "Spearman of scores", "Accuracy where they agree (%)",
               "Safety model right where they differ (%)"]  # fmt: skip
    note = "The responses on which they differ most are in samples.jsonl."
    return ResultTable("Agreement of the helpfulness and the safety model", ["Test set"], columns, rows, note)


def accuracy_by_source(summary: Mapping[str, Any]) -> ResultTable:
    """A row a source, a column a model; for test sets of more than one source."""
    rows = []
    for key in summary["test_sets"]:
        reports = [model["test_sets"][key] for model in summary["models"].values()]
        sources = reports[0]["by_source"]
        if len(sources) > 1:
            for source, cell in sources.items():
                cells = [_accuracy(report["by_source"][source]) for report in reports]
                rows.append(([key, source], [*cells, (f"{cell['count']:,}", "")]))
    return ResultTable("Accuracy (%) by source", ["Test set", "Source"], [*summary["models"], "Pairs"], rows, "")


def _reports(summary: Mapping[str, Any]) -> Sequence[tuple[str, str, Mapping[str, Any]]]:
    """(test set, model, its report), the models of a test set together."""
    models = summary["models"].items()
    return [(key, name, model["test_sets"][key]) for key in summary["test_sets"] for name, model in models]


def _by_rating(report: Mapping[str, Any], rating: str) -> Cell:
    if rating not in report["by_rating"]:
        return NONE
    return _accuracy({"accuracy": report["by_rating"][rating], "ci95": report["by_rating_ci95"][rating]})


def _accuracy(cell: Mapping[str, Any] | None) -> Cell:
    return NONE if cell is None else share_cell({"share": cell["accuracy"], "ci95": cell["ci95"]})


def share_cell(cell: Mapping[str, Any] | None) -> Cell:
    """A share and its interval, in per cent."""
    if cell is None or cell["share"] is None:
        return NONE
    low, high = cell["ci95"]
    return _percent(cell["share"]), f"[{100 * low:.1f}, {100 * high:.1f}]"


def _percent(share: float | None) -> str:
    return NONE[0] if share is None else f"{100 * share:.1f}"


def _number(value: float | None) -> str:
    return NONE[0] if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return NONE[0] if value is None else f"{value:+.2f}"
