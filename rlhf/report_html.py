"""What the page `report.html` is made of: its style, tables, and plots as inline SVG."""

from collections.abc import Sequence
from html import escape

from matplotlib.figure import Figure

from rlhf import plots

# Dark and light by the reader's own setting; plots draw in the text colour.
CSS = """
:root { color-scheme: light dark; --text: #1c2128; --dim: #626b76; --line: #d5dae0; --back: #ffffff; --box: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e3e7ec; --dim: #9aa4b0; --line: #3a424c; --back: #15181c; --box: #1e2329; }
}
body { color: var(--text); background: var(--back); font: 16px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem; }
h1 { margin: 0; } h2 { margin: 2.5rem 0 .5rem; border-bottom: 1px solid var(--line); } h3 { margin: 1.5rem 0 .3rem; }
p, figcaption { max-width: 46rem; } figcaption, .dim { color: var(--dim); font-size: .9rem; }
figure { margin: 1rem 0; overflow-x: auto; } svg { width: 100%; min-width: 30rem; height: auto; display: block; }
figure.narrow svg { max-width: 34rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; } td.number, th.number { text-align: right; }
td small { display: block; color: var(--dim); white-space: nowrap; }
.met { color: #2a8f5b; } .missed { color: #d4493f; font-weight: 600; }
.said { background: var(--box); border-radius: .4rem; padding: .4rem .8rem; margin: .3rem 0; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; } td .said { min-width: 16rem; margin: 0; }
pre { background: var(--box); padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


def missing_html(sentence: str) -> str:
    """What is said in place of something that the run did not do or measure; `sentence` holds HTML."""
    return f'<p class="dim">{sentence}</p>'


def figure_html(figure: Figure | None, name: str, caption: str, missing: str, narrow: bool = False) -> str:
    """A plot with a caption, both text; `missing` where there is no plot."""
    if figure is None:
        return missing_html(missing)
    svg = plots.to_svg(figure, name, f"plot: {name}")
    return f"<figure{' class=narrow' if narrow else ''}>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def table_html(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: range = range(0)) -> str:
    """`rows` hold HTML; `numbers` are the columns set flush right."""

    def line(cells: Sequence[str], tag: str) -> str:
        right = ' class="number"'
        return "".join(f"<{tag}{right if i in numbers else ''}>{c}</{tag}>" for i, c in enumerate(cells))

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{line(head, "th")}</tr>{body}</table></div>'
