"""Error type for mistakes in user input."""


class ConfigError(ValueError):
    """Mistake in user input: a recipe, a file or the command line.

    The message is complete text: the key, the fact with both values, the remedy.
    `cli.py` prints it without a traceback and exits with 2.
    """

    def __init__(self, *breaches: str):
        super().__init__("\n".join(breaches))
        self.breaches = list(breaches)
