"""The one error a user's mistake raises."""


class ConfigError(ValueError):
    """A mistake in what the user gave: a recipe, a file, a command line.

    The message is finished text: the place, what is wrong with both numbers, the way out.
    `cli.py` prints it without a traceback and exits with 2.
    """

    def __init__(self, *breaches: str):
        super().__init__("\n".join(breaches))
        self.breaches = list(breaches)
