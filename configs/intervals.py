"""Confidence intervals of shares [pure]."""

import math

Z_95 = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share of independent trials; half a success (a tie) may count.

        (p + z^2/2n  -+  z sqrt(p (1 - p)/n + z^2/4n^2)) / (1 + z^2/n),   p = successes / n

    Unlike p -+ z sqrt(p (1 - p)/n) it has a width at p = 0 and p = 1. No trial gives (0, 1): nothing is known.
    Raises ValueError for successes outside 0 to n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At the ends the algebra gives exactly 0 and 1; rounding would give 1e-17 and 1 - 1e-16.
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high
