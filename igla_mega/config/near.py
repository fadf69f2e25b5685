"""Valid numbers near an invalid one, for the remedies of error messages."""


def near_divisors(number: int, wanted: int) -> str:
    """Return the divisors of `number` closest to `wanted` on both sides, as text: `2 or 4`."""
    # Bounded search: a mistyped number may have a dozen digits too many. 1 and the number itself always divide it.
    start = min(wanted - 1, number)
    below = next((size for size in range(start, max(0, start - 10**5), -1) if number % size == 0), 1)
    above = next((size for size in range(wanted + 1, min(number, wanted + 10**5)) if number % size == 0), number)
    return " or ".join(str(size) for size in dict.fromkeys((below, above)) if size != wanted)


def near_multiples(unit: int, wanted: int) -> str:
    """Return the multiples of `unit` closest to `wanted` on both sides, as text: `8190 or 8196`."""
    below = wanted // unit * unit
    return " or ".join(str(size) for size in (below, below + unit) if size > 0)
