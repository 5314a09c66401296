"""Wilson's interval against published tables."""

import pytest

from configs.intervals import wilson


def test_wilson_interval():
    # Newcombe (1998), table I: 81 of 263 -> 0.2553 to 0.3662; 15 of 148 -> 0.0624 to 0.1605; 0 of 20 -> 0 to 0.1611;
    # 1 of 29 -> 0.0061 to 0.1718
    for k, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)
    # 8 of 10: the textbook interval is 0.490 to 0.943
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)  # mirrored
    assert wilson(0, 20)[0] == 0.0
    assert wilson(20, 20)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        wilson(3, 2)
