"""Open the loader selected by `data.loader`."""

from igla_mega.config.errors import ConfigError
from igla_mega.data.prefetch import Loader, Make, Prefetch


def open_loader(kind: str, make: Make, depth: int) -> Loader:
    """Return the loader of the given kind, `native` or `dali`, over the micro-batches of `make`.

    Args:
        depth: number of micro-batches assembled ahead of their use.

    Raises:
        ConfigError: the kind is unknown, or its package is not installed.
    """
    if kind == "native":
        return Prefetch(make, depth)
    if kind != "dali":
        raise ConfigError(f"data.loader: {kind} is neither `native` nor `dali`.")
    # Late: the module is of use only with nvidia-dali, an optional package.
    from igla_mega.data.dali import Dali

    return Dali(make, depth)
