"""Open the loader that a recipe asks for."""

from igla_mega.config.errors import ConfigError
from igla_mega.data.prefetch import Loader, Make, Prefetch


def open_loader(kind: str, make: Make, depth: int) -> Loader:
    """The loader that a recipe asks for.

    Raises:
        ConfigError: it is not installed, or there is none of this name.
    """
    if kind == "native":
        return Prefetch(make, depth)
    if kind != "dali":
        raise ConfigError(f"data.loader: {kind} is neither `native` nor `dali`.")
    from igla_mega.data.dali import Dali

    return Dali(make, depth)
