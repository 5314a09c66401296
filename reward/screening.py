"""What training pairs repeat, contradict or give away: duplicates, contradictions, prompts of the test set.

Pure: sources are lists of preference rows, a place is (number of the source, number of the row in it), both from 0.
"""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from configs.records import canonical_prompt, first_user_turn

Row = dict[str, Any]
Place = tuple[int, int]


@dataclass(frozen=True)
class Leaks:
    """Training pairs that touch the test set."""

    same: dict[Place, int]  # place -> number of the first test row with the same prompt
    near: set[Place]  # only the first user turn is that of a test row: a dialogue that went on differently


def find_leaks(sources: Sequence[Sequence[Row]], test_rows: Sequence[Row]) -> Leaks:
    """Training pairs whose prompt is also a test prompt: letter case, spaces and punctuation aside, role by role."""
    prompts: dict[Any, int] = {}
    for number, row in enumerate(test_rows):
        prompts.setdefault(canonical_prompt(row), number)
    beginnings = {first_user_turn(row) for row in test_rows}
    same: dict[Place, int] = {}
    near: set[Place] = set()
    for place, row in _places(sources):
        prompt = canonical_prompt(row)
        if prompt in prompts:
            same[place] = prompts[prompt]
        elif first_user_turn(row) in beginnings:
            near.add(place)
    return Leaks(same, near)


def find_duplicates(sources: Sequence[Sequence[Row]], skip: Container[Place] = ()) -> dict[Place, Place]:
    """Each pair that says the same as an earlier one -> the first of them; ratings are not compared.

    The same means prompt, chosen and rejected response alike but for white space around messages.
    """
    first: dict[Any, Place] = {}
    found: dict[Place, Place] = {}
    for place, row in _places(sources):
        if place not in skip and (earlier := first.setdefault(_comparison(row), place)) != place:
            found[place] = earlier
    return found


def find_contradictions(sources: Sequence[Sequence[Row]], skip: Container[Place] = ()) -> set[Place]:
    """Pairs that prefer what an earlier pair rejected, of the same two responses to the same prompt."""
    seen: set[Any] = set()
    found: set[Place] = set()
    for place, row in _places(sources):
        if place in skip:
            continue
        prompt, chosen, rejected = _comparison(row)
        if (prompt, rejected, chosen) in seen:
            found.add(place)
        seen.add((prompt, chosen, rejected))
    return found


def _places(sources: Sequence[Sequence[Row]]) -> Iterator[tuple[Place, Row]]:
    return (((s, i), row) for s, rows in enumerate(sources) for i, row in enumerate(rows))


def _comparison(row: Row) -> tuple[Any, Any, Any]:
    def stripped(name: str) -> tuple[tuple[str, str], ...]:
        return tuple((message["role"], message["content"].strip()) for message in row[name])

    return stripped("prompt"), stripped("chosen"), stripped("rejected")
