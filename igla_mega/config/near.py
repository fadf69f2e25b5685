"""Suggest valid numbers near an invalid one, for error messages."""


def near_divisors(number: int, wanted: int) -> str:
    """Return the divisors of a number next to the wanted one, in words: `2 or 4`."""
    # Bounded, for a number with a dozen digits too many; 1 and the number itself divide whatever lies between.
    start = min(wanted - 1, number)
    below = next((size for size in range(start, max(0, start - 10**5), -1) if number % size == 0), 1)
    above = next((size for size in range(wanted + 1, min(number, wanted + 10**5)) if number % size == 0), number)
    return " or ".join(str(size) for size in dict.fromkeys((below, above)) if size != wanted)


def near_multiples(unit: int, wanted: int) -> str:
    """Return the multiples of a unit next to the wanted number, in words: `8190 or 8196`."""
    below = wanted // unit * unit
    return " or ".join(str(size) for size in (below, below + unit) if size > 0)
