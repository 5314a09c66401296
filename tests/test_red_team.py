"""Red-team logs: exact intervals against published ones, person-hours worked by hand, rows that cannot be used."""

from pathlib import Path

import pytest

from configs.errors import UserError
from configs.records import write_jsonl
from rlhf.red_team import Attempt, gamma, garwood, hours, read_log, red_team


def write_log(folder: Path, rows: list[dict]) -> str:
    write_jsonl(folder / "log.jsonl", rows)
    return str(folder / "log.jsonl")


ROW = {"person": "a", "release": "v1", "violation": True, "seconds": 60}


@pytest.mark.parametrize(
    ("count", "low", "high"),  # as in tables of exact Poisson limits
    [(0, 0.0, 3.6889), (1, 0.0253, 5.5716), (2, 0.2422, 7.2247), (10, 4.7954, 18.3904), (100, 81.3640, 121.6268)],
)
def test_garwood_gives_the_published_limits(count, low, high):
    assert garwood(count) == pytest.approx((low, high), abs=1e-4)


def test_overlapping_spans_of_a_person_count_once():
    spans = [(0.0, 1800.0), (900.0, 2700.0), (1000.0, 1100.0), (3600.0, 5400.0)]  # 45 and 30 minutes
    attempts = [Attempt("a", "v1", False, span=span) for span in spans]
    assert hours(attempts) == pytest.approx(1.25)
    assert hours([*attempts, Attempt("a", "v1", True, seconds=900)]) == pytest.approx(1.5)


def test_gamma_is_violations_per_person_hour():
    attempts = [Attempt("a", "v1", i < 3, seconds=1800) for i in range(4)]  # 3 violations in 2 hours
    attempts += [Attempt("b", "v1", False, span=(0, 3600)), Attempt("b", "v1", False, span=(0, 3600))]  # 1 hour
    found = gamma(attempts)
    assert (found["gamma"], found["violations"], found["persons"], found["hours"]) == (1.0, 3, 2, 3.0)
    low, high = garwood(3)
    assert found["ci95"] == pytest.approx([low / 3, high / 3])
    assert found["ci95_persons"] is None  # two persons


def test_people_who_differ_widen_the_interval_over_persons():
    same = [Attempt(str(p), "v1", True, seconds=1800) for p in range(20) for _ in range(4)]
    differ = [Attempt(str(p), "v1", p < 2, seconds=45) for p in range(20) for _ in range(160)]
    for attempts, gamma_is in ((same, 2.0), (differ, 8.0)):
        assert gamma(attempts)["gamma"] == pytest.approx(gamma_is)
    assert gamma(same)["ci95_persons"] == [2.0, 2.0]
    low, high = gamma(differ)["ci95_persons"]
    exact = gamma(differ)["ci95"]
    assert low < exact[0] < exact[1] < high


def test_prompts_that_broke_a_release_are_looked_for_in_the_next():
    def tried(release: str, prompt: str, violation: bool) -> Attempt:
        return Attempt("a", release, violation, seconds=60, prompt=prompt)

    log = [
        *(tried("v1", name, True) for name in ("p", "q", "r", "s")), tried("v1", "t", False),
        tried("v2", "p", False), tried("v2", "q", True), tried("v2", "q", False), tried("v2", "r", False),
        tried("v2", "t", True),  # s was not tried again, t had not broken v1
    ]  # fmt: skip
    found = red_team(log)
    assert list(found) == ["v1", "v2"]
    assert "of_the_last_rejected" not in found["v1"]
    rejected = found["v2"]["of_the_last_rejected"]
    assert (rejected["share"], rejected["count"]) == (pytest.approx(2 / 3), 3)
    assert red_team(log, ["v2", "v1"])["v1"]["of_the_last_rejected"]["count"] == 2  # q and t
    with pytest.raises(UserError, match="releases: v1 are not those of the log, v1, v2"):
        red_team(log, ["v1"])


def test_times_are_read_as_seconds(tmp_path):
    rows = [
        ROW | {"seconds": None, "started": "2023-07-18T09:30:00Z", "ended": "2023-07-18T12:00:00+02:00"},
        ROW | {"seconds": None, "started": 10, "ended": 40.5, "release": 2},
    ]
    first, second = read_log(write_log(tmp_path, rows))
    assert hours([first]) == pytest.approx(0.5)
    assert (second.release, hours([second])) == ("2", pytest.approx(30.5 / 3600))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"violation": "yes"}, "'violation' must be true or false"),
        ({"violation": None}, "there is no 'violation'"),
        ({"person": ""}, "'person' is empty"),
        ({"release": None}, "there is no 'release'"),
        ({"seconds": 0}, "'seconds' must be a number above 0"),
        ({"seconds": True}, "'seconds' must be a number above 0"),
        ({"seconds": None}, "give 'seconds', or both"),
        ({"started": 3}, "'seconds' and 'started' are both there"),
        ({"seconds": None, "started": 3}, "give 'seconds', or both"),
        ({"seconds": None, "started": 3, "ended": 3}, "'ended' must be after"),
        ({"seconds": None, "started": "9 o'clock", "ended": "2023-07-18T09:30:00"}, "'started' is no ISO 8601 time"),
        ({"seconds": None, "started": 3, "ended": "2023-07-18T09:30:00"}, "must both be times"),
        ({"prompt": 7}, "'prompt' must be text"),
    ],
)
def test_a_bad_row_is_named(change, message, tmp_path):
    log = write_log(tmp_path, [ROW, ROW | change])
    with pytest.raises(UserError, match=message) as caught:
        read_log(log)
    assert str(caught.value).startswith(f"{log}:2: ")


def test_an_empty_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no rows"):
        read_log(write_log(tmp_path, []))
