"""Send metrics to MLflow, whose package is optional."""

import contextlib
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_text, write_text

ID_FILE = "mlflow_id"
"""File of the run folder with the id under which a resume continues the charts."""
MAX_VALUE = 500
"""Maximum length of a parameter's value, in characters; MLflow refuses longer ones."""


class MlflowRun:
    """Run at MLflow: its parameters are the recipe's keys, its metrics the scalars of each step.

    Raises:
        ConfigError: the package is not installed, or the address cannot be used.
    """

    def __init__(self, address: str, experiment: str, run_dir: Path, recipe: Mapping[str, Any]):
        # Nothing is sent to anybody but the server that the recipe names.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        # By default the package tries for minutes to reach a server that does not answer.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        try:
            from mlflow.entities import Metric, Param
            from mlflow.exceptions import MlflowException
            from mlflow.tracking import MlflowClient
        except ImportError:
            raise ConfigError(
                f"logging.mlflow: {address} needs the package mlflow, which is not installed.\n"
                "  Run `pip install mlflow-skinny` (or install the extra `track`), or remove logging.mlflow."
            ) from None
        self._metric, self._error = Metric, MlflowException
        try:
            self._client = MlflowClient(address)
            self._id = self._open(experiment, run_dir)
            params = [Param(key[:250], str(value)[:MAX_VALUE]) for key, value in _flat(recipe).items()]
            # A resumed run may have other values, which MLflow refuses: the first ones stay.
            with contextlib.suppress(MlflowException):
                for at in range(0, len(params), 100):
                    self._client.log_batch(self._id, params=params[at : at + 100])
        except (MlflowException, OSError, ValueError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"logging.mlflow: {address} cannot be used: {first}\n"
                "  Give a database or a folder (sqlite:///mlflow.db, file:mlruns), or the address of a server."
            ) from None

    def metrics(self, scalars: Mapping[str, float], step: int) -> None:
        """Send the numbers of a step.

        Raises:
            OSError: they could not be sent.
        """
        now = int(1000 * time.time())
        batch = [
            self._metric(key[:250], float(value), now, step) for key, value in scalars.items() if math.isfinite(value)
        ]
        try:
            for at in range(0, len(batch), 1000):
                self._client.log_batch(self._id, metrics=batch[at : at + 1000])
        except self._error as error:
            raise OSError(f"MLflow: {error}") from None

    def close(self) -> None:
        """Mark the run as no longer active.

        Raises:
            OSError: the server could not be reached.
        """
        try:
            self._client.set_terminated(self._id)
        except self._error as error:
            raise OSError(f"MLflow: {error}") from None

    def _open(self, experiment: str, run_dir: Path) -> str:
        """Return the id of the run at MLflow: that of the run folder, or a new one."""
        path = run_dir / ID_FILE
        if path.is_file():
            known = read_text(path).strip()
            with contextlib.suppress(self._error):  # the database may have been replaced since
                self._client.update_run(known, "RUNNING")
                return known
        found = self._client.get_experiment_by_name(experiment)
        place = found.experiment_id if found is not None else self._client.create_experiment(experiment)
        made = self._client.create_run(place, run_name=run_dir.resolve().name).info.run_id
        write_text(path, f"{made}\n")
        return made


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a recipe by dotted keys; keys without a value are left out."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{name}.")
        elif value is not None:
            found[name] = value
    return found
