"""Loss and error around weights, and between them: rays, segments, planes."""


def spaced(first: float, last: float, count: int) -> tuple[float, ...]:
    """So many numbers at equal distances, both ends among them."""
    step = (last - first) / max(1, count - 1)
    return tuple(first + step * number for number in range(count))
