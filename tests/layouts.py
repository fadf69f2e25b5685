"""Names of layouts in test ids, and how far two runs are from each other."""


def label(case) -> str:
    if not isinstance(case, tuple):
        return str(case)
    num_ranks, *given = case
    return "-".join([str(num_ranks), *(f"{key}={value}" for part in given for key, value in part.items())])


def largest_differences(reports, reference) -> tuple[float, float]:
    assert len(reports) == len(reference) >= 5
    pairs = list(zip(reports, reference, strict=True))
    return max(abs(a[0] - b[0]) for a, b in pairs), max(abs(a[1] - b[1]) for a, b in pairs)
