"""How long an instruction holds: share of replies that obey, by dialogue turn (paper App. A.3.5, Table 30).

The instruction stands in the first turn only; turn t asks whether reply t still obeys. A turn counts as obeyed only if
the reply obeys by the kind's checker AND answers its question: a model that repeats "Napoleon" and nothing else must
not pass.

Pure functions. One `Observation` is one reply; turns count from 1.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    """

    dialogue: int
    turn: int
    kind: str
    obeyed: bool
    answer_ok: bool = True

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
    dialogues = len(influence)
    variance = sum(d * d for d in influence.values()) * dialogues / max(dialogues - 1, 1)
    if variance < 1e-18:
        low, high = wilson(round(mean * dialogues), dialogues)
        low, high = min(low, mean), max(high, mean)
    else:
        half = Z_95 * math.sqrt(variance)
        low, high = max(0.0, mean - half), min(1.0, mean + half)
    return {"mean": mean, "low": low, "high": high, "turns": len(shares)}


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
         "by_kind": {kind: {"1": share, ...}},
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
    summary["by_kind"] = {
        kind: {str(t): _share(cell) for t, cell in by_turn(o for o in observations if o.kind == kind).items()}
        for kind in sorted({o.kind for o in observations})
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
