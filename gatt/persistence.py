"""How long an instruction holds: share of replies that obey, by dialogue turn (paper App. A.3.5, Table 30).

The instruction stands in the first turn only; turn t asks whether reply t still obeys. A turn counts as obeyed only if
the reply obeys by the kind's checker AND answers its question: a model that repeats "Napoleon" and nothing else must
not pass.

Pure functions. One `Observation` is one reply; turns count from 1.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from configs.errors import UserError
from configs.intervals import Z_95, wilson


@dataclass(frozen=True)
class Observation:
    """One reply of a persistence dialogue.

    Attributes:
        dialogue: index of the dialogue; replies of one dialogue depend on each other.
        turn: from 1.
        kind: the instruction's kind.
        obeyed: the checker's verdict on the reply.
        answer_ok: whether the reply, its decoration left out, answers (True where that is not judged).
        parts: of a combination of instructions, the verdict on each by its kind; None of a single one.
    """

    dialogue: int
    turn: int
    kind: str
    obeyed: bool
    answer_ok: bool = True
    parts: Mapping[str, bool] | None = None

    @property
    def counts(self) -> bool:
        """The turn counts as obeyed."""
        return self.obeyed and self.answer_ok


def by_turn(observations: Iterable[Observation]) -> dict[int, tuple[int, int]]:
    """{turn: (replies that count as obeyed, replies observed)}, turns ascending; unobserved turns are absent."""
    table: dict[int, list[int]] = {}
    for observation in observations:
        cell = table.setdefault(observation.turn, [0, 0])
        cell[0] += observation.counts
        cell[1] += 1
    return {turn: (table[turn][0], table[turn][1]) for turn in sorted(table)}


def range_mean(observations: Sequence[Observation], first: int, last: int) -> dict[str, float] | None:
    """Mean over turns `first..last` of the share obeyed at each turn, with a 95 % interval over dialogues.

    Turns weigh equally, however many dialogues reached them. Replies of one dialogue are not independent, so the
    interval takes the dialogue as its unit: the normal interval of the clustered ratio estimate, clipped to [0, 1],

        share_t = K_t / N_t;   mean = (1/T) sum_t share_t
        d_i = (1/T) sum_t (k_it - share_t n_it) / N_t;   var = sum_i d_i^2

    with a small-sample factor D / (D - 1). Where no dialogue differs from another (all obey, or none) that variance is
    0 and Wilson's interval with one trial a dialogue stands in.

    Returns:
        {"mean", "low", "high", "turns"}: `turns` is how many turns of the range were observed at all; None for none.
    """
    chosen = [o for o in observations if first <= o.turn <= last]
    table = by_turn(chosen)
    if not table:
        return None
    shares = {turn: hits / n for turn, (hits, n) in table.items()}
    mean = sum(shares.values()) / len(shares)
    influence: dict[int, float] = {}
    for o in chosen:
        step = (o.counts - shares[o.turn]) / table[o.turn][1] / len(shares)
        influence[o.dialogue] = influence.get(o.dialogue, 0.0) + step
    low, high = _clustered(mean, list(influence.values()))
    return {"mean": mean, "low": low, "high": high, "turns": len(shares)}


def _clustered(mean: float, influence: Sequence[float]) -> tuple[float, float]:
    """The interval of `range_mean` from d_i, one a dialogue."""
    dialogues = len(influence)
    variance = sum(d * d for d in influence) * dialogues / max(dialogues - 1, 1)
    if variance < 1e-18:
        low, high = wilson(round(mean * dialogues), dialogues)
        return min(low, mean), max(high, mean)
    half = Z_95 * math.sqrt(variance)
    return max(0.0, mean - half), min(1.0, mean + half)


def last_turn(observations: Sequence[Observation]) -> dict | None:
    """Share of dialogues whose last reply counts: at the context limit, where dialogues were played that far.

    Returns:
        {"share", "ci95": Wilson's interval over dialogues, "dialogues", "turns": {"fewest", "median", "most"}}; None
        for no reply at all.
    """
    last: dict[int, Observation] = {}
    for o in observations:
        if o.dialogue not in last or o.turn > last[o.dialogue].turn:
            last[o.dialogue] = o
    if not last:
        return None
    hits, turns = sum(o.counts for o in last.values()), sorted(o.turn for o in last.values())
    return {
        "share": hits / len(last),
        "ci95": list(wilson(hits, len(last))),
        "dialogues": len(last),
        "turns": {"fewest": turns[0], "median": statistics.median(turns), "most": turns[-1]},
    }


def summarise(
    observations: Sequence[Observation], turns: int, dialogues: int, ranges: Sequence[tuple[int, int]] = ()
) -> dict:
    """The persistence table of one model and one set of instruction values.

    Args:
        turns: turns a dialogue was meant to have.
        dialogues: dialogues that were started.
        ranges: inclusive turn ranges to average over, e.g. (6, 20); a range is cut at `turns`.

    Returns:
        {"1": share, ..., str(turns): share,        None where no dialogue reached the turn
         "ci95": {"1": [low, high], ...},
         "mean": {"1-20": {"mean", "low", "high", "turns"}, ...},
         "last_turn": see `last_turn`,
         "by_kind": {kind: {"1": share, ...}}, "by_kind_ci95": {kind: {"1": [low, high], ...}},
         "by_kind_mean": {kind: {"1-20": {"mean", "low", "high", "turns"}, ...}},
         "obeyed": {"1": share, ...}, "answered": {"1": share, ...}   the two conditions apart,
         "dialogues": int, "missing": {turn: dialogues that never reached it}}

    Raises:
        UserError: no turn or no dialogue was asked for.
    """
    if turns < 1:
        raise UserError(f"turns is {turns}; a persistence dialogue needs at least one turn")
    if dialogues < 1:
        raise UserError(f"num_dialogues is {dialogues}; persistence needs at least one dialogue")
    table = by_turn(observations)
    numbers = range(1, turns + 1)
    summary: dict = {str(t): _share(table.get(t)) for t in numbers}
    summary["ci95"] = {str(t): list(wilson(*table.get(t, (0, 0)))) for t in numbers}
    spans = [(first, min(last, turns)) for first, last in ranges if first <= turns]
    summary["mean"] = {f"{first}-{last}": range_mean(observations, first, last) for first, last in spans}
    summary["last_turn"] = last_turn(observations)
    kinds = {kind: [o for o in observations if o.kind == kind] for kind in sorted({o.kind for o in observations})}
    cells = {kind: by_turn(chosen) for kind, chosen in kinds.items()}
    summary["by_kind"] = {kind: {str(t): _share(cell) for t, cell in table.items()} for kind, table in cells.items()}
    summary["by_kind_ci95"] = {
        kind: {str(t): list(wilson(*cell)) for t, cell in table.items()} for kind, table in cells.items()
    }
    summary["by_kind_mean"] = {
        kind: {f"{first}-{last}": range_mean(chosen, first, last) for first, last in spans}
        for kind, chosen in kinds.items()
    }
    if parts := sorted({part for o in observations for part in o.parts or ()}):
        each = {part: [replace(o, obeyed=o.parts[part]) for o in observations if o.parts and part in o.parts]
                for part in parts}  # fmt: skip
        summary["by_part"] = {
            part: {str(t): _share(cell) for t, cell in by_turn(chosen).items()} for part, chosen in each.items()
        }
    summary["obeyed"] = _condition_share(observations, turns, "obeyed")
    summary["answered"] = _condition_share(observations, turns, "answer_ok")
    summary["dialogues"] = dialogues
    reached = {t: table.get(t, (0, 0))[1] for t in numbers}
    summary["missing"] = {str(t): dialogues - n for t, n in reached.items() if n < dialogues}
    return summary


def _share(cell: tuple[int, int] | None) -> float | None:
    return cell[0] / cell[1] if cell else None


def _condition_share(observations: Sequence[Observation], turns: int, attribute: str) -> dict[str, float | None]:
    shares: dict[str, float | None] = {}
    for turn in range(1, turns + 1):
        values = [getattr(o, attribute) for o in observations if o.turn == turn]
        shares[str(turn)] = sum(values) / len(values) if values else None
    return shares


def since(observations: Iterable[Observation], change_turn: int) -> list[Observation]:
    """The replies from `change_turn` on, their turns counted from there (the turn of the change is 1)."""
    return [replace(o, turn=o.turn - change_turn + 1) for o in observations if o.turn >= change_turn]


def change_table(
    new: Sequence[Observation], old: Sequence[Observation], change_turn: int, turns: int, dialogues: int
) -> dict:
    """What becomes of two instructions where the second takes the place of the first at `change_turn`.

    Args:
        new: every reply judged by the second instruction; what stands before the change is left out.
        old: every reply judged by the first one.
        turns: turns a dialogue was meant to have.
        dialogues: dialogues that were started.

    Returns:
        {"turn": change_turn,
         "new": `summarise` of the second instruction, turns counted from the change,
         "old_before": `range_mean` of the first one before the change,
         "old_after": of how far it still shows in replies after it, answered or not: 0 where the change is complete}
    """
    shown = [replace(o, answer_ok=True) for o in since(old, change_turn)]
    after = turns - change_turn + 1
    return {
        "turn": change_turn,
        "new": summarise(since(new, change_turn), after, dialogues, ((1, after),)),
        "old_before": range_mean(old, 1, change_turn - 1),
        "old_after": range_mean(shown, 1, after),
    }
