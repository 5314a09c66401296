"""What notebooks show: figures as PNG on white, tables and messages as HTML.

Objects have `_repr_png_` and `_repr_html_`, which any notebook program asks for, so nothing of Jupyter is imported.
Text keeps the page's colour: readable on white and on dark pages. All text of models is escaped.
"""

import html
import io
import warnings
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from rlhf.reward_figures import ON_WHITE

DPI = 144
SHOWN_CHARACTERS = 600  # of a message in a table


class Html:
    """A piece of HTML, shown as such."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _repr_html_(self) -> str:
        return self.text


class Picture:
    """A figure as a PNG, sharp on screens of double density; a line of text where there was nothing to draw."""

    def __init__(self, figure: Figure | None, missing: str = "Nothing to draw.") -> None:
        self.png: bytes | None = None
        self.missing = missing
        if figure is not None:
            buffer = io.BytesIO()
            with mpl.rc_context(ON_WHITE), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*missing from font")  # tokens of any script; HTML has them
                figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.15)
            self.png = buffer.getvalue()

    def _repr_png_(self) -> tuple[bytes, dict[str, int]] | None:
        if self.png is None:
            return None
        width = int.from_bytes(self.png[16:20], "big")  # of the PNG's header
        return self.png, {"width": width * 72 // DPI * 4 // 3}

    def __repr__(self) -> str:
        return "a figure" if self.png else self.missing


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """An HTML table; cells are HTML already."""
    style = 'style="text-align: left; vertical-align: top; white-space: normal; padding: 0.3em 0.6em"'
    top = "".join(f"<th {style}>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td {style}>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def prompt_cell(messages: Sequence[Mapping[str, str]]) -> str:
    """The last user message as HTML; how many stand before it."""
    before = len(messages) - 1
    earlier = f"<i>after {before} earlier message{'s' * (before > 1)}</i><br>" if before else ""
    return earlier + text_cell(messages[-1]["content"])


def text_cell(text: str) -> str:
    """A message as HTML, shortened."""
    cut = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
    return html.escape(cut).replace("\n", "<br>")
