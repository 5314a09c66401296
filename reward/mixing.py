"""How many pairs each source gives, and which: the paper's 50/50 and 90/10 mixtures (§3.2.2), any weights, any sources.

No row is drawn a second time before every row of its source has been drawn once.
"""

import random
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from configs.errors import UserError
from configs.records import canonical_prompt, first_user_turn

Row = dict[str, Any]
CANDIDATES = 32  # prompts among which the most similar one lends its answer


def mix_sizes(available: Sequence[int], weights: Sequence[float] | None, total: int | None = None) -> list[int]:
    """Rows to draw from each source, so that shares follow `weights`; these need not sum to one.

    With `total`, exactly so many rows, which may take more from a source than it has (`mix` then repeats). Without,
    as many as no repeat allows: at least one source is used up. `weights` None: sources count by their rows.
    UserError where a source that has a weight would give no row at all.
    """
    if weights is None:
        return list(available) if total is None or not sum(available) else _apportion(available, total)
    if total is not None:
        sizes = [size if rows else 0 for rows, size in zip(available, _apportion(weights, total), strict=True)]
        missing = sizes
    else:
        most = min(rows / weight for rows, weight in zip(available, weights, strict=True))
        sizes = [min(rows, int(most * weight + 1e-9)) for rows, weight in zip(available, weights, strict=True)]
        missing = sizes if all(available) else list(available)  # one empty source empties all: name that one
    if 0 in missing:
        raise UserError(
            f"mix_weights: shares {list(weights)} of sources with {list(available)} rows leave source "
            f"{missing.index(0) + 1} without any row; add rows or change the weights"
            + ("" if total is None else f" or mix_rows {total}")
        )
    return sizes


def mix(sources: Sequence[Sequence[Any]], sizes: Sequence[int], seed: int) -> list[Any]:
    """So many rows of each source, in a seeded order of training.

    A source that must give more rows than it has is gone through in whole passes, the last one in part; in the order
    returned, every row of a pass stands before any row of the next.
    """
    rng = random.Random(seed)
    drawn: list[tuple[int, int, Any]] = []  # (source, pass, row)
    for number, (source, size) in enumerate(zip(map(list, sources), sizes, strict=True)):
        for turn, start in enumerate(range(0, size, len(source) or 1)):
            drawn += [(number, turn, row) for row in rng.sample(source, min(len(source), size - start))]
    rng.shuffle(drawn)
    in_turn = [iter(sorted((d for d in drawn if d[0] == n), key=lambda d: d[1])) for n in range(len(sources))]
    return [next(in_turn[number])[2] for number, _, _ in drawn]


def mismatched_pairs(rows: Sequence[Row], share: float, seed: int) -> list[Row]:
    """round(share * len(rows)) preference rows that prefer an answer to the question over one to another question.

    Each takes prompt and chosen response of a row (all rows once before any twice); its rejected response is the chosen
    one of another prompt: of CANDIDATES drawn, the one whose last user turn has the most words in common, relative to
    all words of both (Jaccard). Rated `significantly_better` where the row has a rating; no margin, no safety
    label, source `mismatched`. Fewer rows come out where other prompts have no other response.
    """
    rng = random.Random(f"mismatched {seed}")
    prompts = [canonical_prompt(row) for row in rows]
    words = [frozenset(re.findall(r"\w+", row["prompt"][-1]["content"].lower())) for row in rows]
    count, made = round(share * len(rows)), []
    for place in mix([range(len(rows))], [count], rng.randrange(2**32)):
        row, answer = rows[place], rows[place]["chosen"][0]["content"]
        others = [
            other for other in rng.sample(range(len(rows)), min(CANDIDATES, len(rows)))
            if prompts[other] != prompts[place] and rows[other]["chosen"][0]["content"].strip() != answer.strip()
        ]  # fmt: skip
        if not others:
            continue
        nearest = max(others, key=lambda o: len(words[o] & words[place]) / max(1, len(words[o] | words[place])))
        labels = {"rating": "significantly_better" if row.get("rating") else None, "margin": None, "safety": None}
        made.append({"prompt": row["prompt"], "chosen": row["chosen"], "rejected": rows[nearest]["chosen"], **labels,
                     "source": "mismatched"})  # fmt: skip
    return made


def interleaved(rows: Sequence[Row], more: Sequence[Row], seed: int) -> list[Row]:
    """Both together, `more` at seeded random places, each in its own order."""
    places = [False] * len(rows) + [True] * len(more)
    random.Random(f"interleaved {seed}").shuffle(places)
    sources = iter(rows), iter(more)
    return [next(sources[place]) for place in places]


def nested_subsets(
    rows: Sequence[dict[str, Any]], shares: Sequence[float], by_prompt: bool, seed: int
) -> list[list[dict[str, Any]]]:
    """For each share in (0, 1] the rows of that part, in their order; a smaller part lies inside every larger one.

    A part is the first `share` of one seeded order: of the prompts (first user turns, with all their rows) or of the
    rows, rounded down.
    """
    keys: list[Any] = [first_user_turn(row) for row in rows] if by_prompt else list(range(len(rows)))
    order = list(dict.fromkeys(keys))
    random.Random(seed).shuffle(order)
    place = {key: i for i, key in enumerate(order)}
    sizes = [int(share * len(order) + 1e-9) for share in shares]
    return [[row for row, key in zip(rows, keys, strict=True) if place[key] < size] for size in sizes]


def _apportion(weights: Sequence[float], total: int) -> list[int]:
    """`total` cut by `weights` into whole numbers: rounded down, the rest to the largest remainders (first ones first).

    Exact fractions, so that 0.1 + 0.2 + 0.7 of ten rows are one, two and seven.
    """
    exact = [Fraction(weight) * total / sum(map(Fraction, weights)) for weight in weights]
    sizes = [int(share) for share in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (sizes[i] - exact[i], i))
    for i in by_remainder[: total - sum(sizes)]:
        sizes[i] += 1
    return sizes
