"""Open and run tasks of lm-evaluation-harness, which is imported only here and only when needed."""

from typing import TYPE_CHECKING

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Tasks
from igla_mega.data.tokenizer import Tokenizer
from igla_mega.engine.step import Engine

if TYPE_CHECKING:
    from igla_mega.evaluate.harness import Harness


def open_harness(asked: Tasks, tokenizer: Tokenizer, longest: int, *, place: str = "evaluation.tasks") -> "Harness":
    """Open tasks of lm-evaluation-harness. The arguments are those of `Harness`.

    Raises:
        ConfigError: lm-evaluation-harness is not installed, or as for `Harness`.
    """
    try:
        from igla_mega.evaluate.harness import Harness
    except ImportError as error:
        # Anything else that is missing is a fault of the installation, and must not be reported as a missing extra.
        if error.name is not None and error.name.split(".")[0] not in ("lm_eval", "datasets", "huggingface_hub"):
            raise
        raise ConfigError(
            f"{place}: lm-evaluation-harness is not installed ({error}).\n  pip install 'igla-mega[eval]'"
        ) from None
    return Harness(asked, tokenizer, longest, place=place)


def run_tasks(engine: Engine, harness: "Harness | None", seed: int) -> dict[str, float] | str:
    """Run tasks on the model with its current weights. Collective; `harness` is None on all but the main rank.

    Returns:
        On the main rank `task/metric` -> value, or the reason if a task's own code failed; an empty dictionary on the
        others.

    Raises:
        RuntimeError: a forward pass failed.
    """
    from igla_mega.evaluate.harness import Asker, serve

    if harness is None:
        serve(engine)
        return {}
    asker = Asker(engine)
    try:
        return harness.results(asker, seed)
    except Exception as error:
        if asker.failed:
            raise
        # The task's own code failed (its metric or filter), which must not end a training run.
        return f"failed ({type(error).__name__}: {error})"
    finally:
        asker.close()
