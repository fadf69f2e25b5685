"""Run tasks of lm-evaluation-harness on a model in any layout.

The harness runs on the main rank only. The other ranks wait for its requests and take part in the forward passes
(`Asker`, `serve`). Nothing is downloaded. Import this module only where tasks are configured: lm-eval is an extra.
"""

import difflib
import io
import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import torch.distributed as dist
from lm_eval import evaluator, tasks, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Tasks
from igla_mega.data.tokenizer import Tokenizer
from igla_mega.engine.step import Engine
from igla_mega.evaluate import scoring
from igla_mega.evaluate.scoring import Row, Score

FEWSHOT_SEED, PYTHON_SEED, NUMPY_SEED = 1234, 0, 1234
"""Default seeds of the harness, so that scores are comparable with published ones."""
MAX_NEW_TOKENS = 256
"""Maximum number of new tokens for a task without a limit; the default of the harness."""
_NOT_DRAWN = {"top_p": 1.0, "top_k": 0, "num_beams": 1, "repetition_penalty": 1.0}
"""Unsupported generation settings, and the value that disables each."""


class Asker:
    """Sends requests of the main rank to all ranks; the others are in `serve` until `close`."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.failed = False
        """True if a forward pass failed on this rank: the ranks may then be in different collectives, and no further
        request can be sent."""

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Return the same as `scoring.score`."""
        return self._ask(("score", rows, None, 0.0))

    def next_tokens(self, texts: list[list[int]], keys: list[int], *, temperature: float) -> list[int]:
        """Return the same as `scoring.next_tokens`."""
        return self._ask(("next", texts, keys, temperature))

    def close(self) -> None:
        """End `serve` on the other ranks, unless a forward pass failed."""
        if not self.failed:
            _broadcast(self._engine, None)

    def _ask(self, question: tuple) -> list:
        """Send a request to all ranks, and take part in it."""
        # Set before the call and cleared after it, so that any exception in between leaves it set.
        self.failed = True
        _broadcast(self._engine, question)
        answers = _answer(self._engine, question)
        self.failed = False
        return answers


def serve(engine: Engine) -> None:
    """Take part in the requests of the main rank until it calls `Asker.close`."""
    while (question := _broadcast(engine, None)) is not None:
        _answer(engine, question)


def _broadcast(engine: Engine, question: tuple | None) -> tuple | None:
    """Return the main rank's request on every rank; None ends `serve`."""
    if engine.mesh.world_size == 1:
        return question
    box = [question]
    dist.broadcast_object_list(box, src=0, group=engine.mesh.host_group)
    return box[0]


def _answer(engine: Engine, question: tuple) -> list:
    """Run the forward passes of one request. Collective."""
    kind, rows, keys, temperature = question
    if kind == "score":
        return scoring.score(engine, rows)
    return scoring.next_tokens(engine, rows, keys, temperature=temperature)


class EngineLM(TemplateLM):
    """The model as the harness sees it; texts begin as those that the model was trained on."""

    def __init__(self, tokenizer: Tokenizer, longest: int, asker: Asker, seed: int):
        super().__init__()
        self._tokenizer, self._longest, self._asker, self._seed = tokenizer, longest, asker, seed
        self._encode = lru_cache(maxsize=200_000)(self._encoded)

    @property
    def eot_token_id(self) -> int:
        assert self._tokenizer.eod_id is not None, "`Harness` refuses a tokenizer without it"
        return self._tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        # The context of a text without one: what comes before a text in training.
        return self._tokenizer.bos[-1] if self._tokenizer.bos else self.eot_token_id

    @property
    def max_length(self) -> int:
        return self._longest

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Return the token ids of a text, with the begin-of-text token that the model was trained with."""
        return list(self._encode(string, add_special_tokens is not False))

    def _encoded(self, string: str, begins: bool) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode_text(string) if begins else self._tokenizer.encode(string))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[tuple], **_) -> list[tuple[float, bool]]:
        """Return (log-probability of the continuation in nats, True if greedy decoding would yield it) of each."""
        rows = []
        for _, context, continuation in requests:
            if len(continuation) > self._longest:
                raise ValueError(
                    f"an answer has {len(continuation)} tokens, more than the {self._longest} that the model reads"
                )
            ids = np.asarray([*context, *continuation][-(self._longest + 1) :], np.int32)
            rows.append(Row(ids, len(continuation)))  # type: ignore[arg-type]
        return [(one.log_prob, one.not_likeliest == 0) for one in self._asker.score(rows)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of each whole text in nats, summed over adjacent windows."""
        windows: list[tuple] = []
        counts = []
        for request in requests:
            # The first window gets the prefix token, which stands for the text's own begin-of-text token.
            ids = self.tok_encode(request.args[0])[len(self._tokenizer.bos) :]
            rolled = utils.get_rolling_token_windows(ids, self.prefix_token_id, self._longest, 1)
            disjoint = [(None, *utils.make_disjoint_window(window)) for window in rolled]
            windows += disjoint
            counts.append(len(disjoint))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the continuation of each prompt up to its stop sequence; prompts of one temperature run together."""
        end = self._tokenizer.decode([self.eot_token_id])
        texts: list[str] = [""] * len(requests)
        by_temperature: dict[float, list[int]] = {}
        settings = [normalize_gen_kwargs(request.args[1], MAX_NEW_TOKENS) for request in requests]
        for place, kwargs in enumerate(settings):
            by_temperature.setdefault(float(kwargs.get("temperature", 0.0)), []).append(place)
        for temperature, places in by_temperature.items():
            limits = [min(int(settings[place]["max_gen_toks"]), self._longest - 1) for place in places]
            prompts = []
            for place, limit in zip(places, limits, strict=True):
                ids = self.tok_encode(requests[place].args[0]) or [self.prefix_token_id]
                prompts.append(ids[-(self._longest - limit) :])
            stops = [handle_stop_sequences(settings[place].get("until"), eos=end) for place in places]

            # Bound as a default: the closure would otherwise see the stop sequences of the last temperature.
            def ended(number: int, new: list[int], stops: list = stops) -> bool:
                if new[-1] == self.eot_token_id:
                    return True
                text = self._tokenizer.decode(new)
                return any(stop and stop in text for stop in stops[number])

            drawn = scoring.draw(
                partial(self._asker.next_tokens, temperature=temperature),
                prompts,
                max_new_tokens=limits,
                seed=self._seed,
                longest=self._longest,
                ended=ended,
            )
            for place, new, stop in zip(places, drawn, stops, strict=True):
                text = self._tokenizer.decode([token for token in new if token != self.eot_token_id], True)
                texts[place] = postprocess_generated_text(text, stop, None)
        return texts


class Harness:
    """Opened tasks: their examples are loaded, and `results` runs them on a model."""

    def __init__(self, settings: Tasks, tokenizer: Tokenizer, longest: int, *, place: str = "evaluation.tasks"):
        """Open the tasks.

        Args:
            longest: maximum number of tokens that the model reads.
            place: name of the setting in errors.

        Raises:
            ConfigError: a task or its data does not exist, or a task needs something unsupported.
        """
        if tokenizer.eod_id is None:
            raise ConfigError(
                f"{place}: the tokenizer {tokenizer.path} has no end-of-document token, which is used as the empty "
                "context. Set eos_token in its tokenizer_config.json."
            )
        self._settings, self._tokenizer, self._longest, self._place = settings, tokenizer, longest, place
        with _quiet():
            self._loaded = self._load()
        for name, task in self._loaded["tasks"].items():
            self._refuse(name, task)
            # As the harness's own command does: a task that fixes 0 keeps it, and one without a number gets 0.
            if settings.num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=settings.num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    def results(self, asker: Asker, seed: int = 0) -> dict[str, float]:
        """Run the tasks. Only the main rank calls it, within `scoring.undisturbed`: it seeds the global generators.

        Returns:
            `task/metric` -> value; a metric of a filter other than `none` is named `task/metric,filter`.
        """
        random.seed(PYTHON_SEED)
        np.random.seed(NUMPY_SEED)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        model = EngineLM(self._tokenizer, self._longest, asker, seed)
        with _quiet():
            found = evaluator.evaluate(
                model, self._loaded, limit=self._settings.limit, bootstrap_iters=0, log_samples=False
            )
        values = {}
        for task, metrics in found["results"].items():
            for key, value in metrics.items():
                metric, _, kind = key.partition(",")
                if kind and isinstance(value, int | float) and not metric.endswith("_stderr"):
                    values[f"{task}/{metric}" if kind == "none" else f"{task}/{key}"] = float(value)
        return values

    def _load(self) -> Any:
        """Open every task: the dictionary that `evaluator.evaluate` takes."""
        settings, place = self._settings, self._place
        manager = self._manager()
        breaches = []
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in settings.names:
            try:
                opened = manager.load([name])
            except (
                Exception
            ) as error:  # a task's YAML may run arbitrary code, and datasets raises exceptions of any type
                first = (str(error).splitlines() or [type(error).__name__])[0]
                breaches.append(
                    f"{place}: {name} cannot be opened: {first}\n  Nothing is downloaded: the data must be in local "
                    "files (dataset_path: json, dataset_kwargs: data_files) or in Hugging Face's cache on this machine."
                )
                continue
            for kind in loaded:
                loaded[kind].update(opened[kind])
        if breaches:
            raise ConfigError(*breaches)
        return loaded

    def _manager(self) -> Any:
        """Return a task manager that has every configured name, or raise ConfigError for all missing ones at once."""
        names, folder, place = self._settings.names, self._settings.include_path, self._place
        if folder is not None and not Path(folder).is_dir():
            raise ConfigError(f"{place}: include_path {folder} is not a folder. Give the folder of the YAML files.")
        # The harness's own thousands of YAML files are slow to index: only if a name is not in the folder.
        manager = tasks.TaskManager(include_path=folder, include_defaults=folder is None)
        if folder is not None and set(names) - set(manager.all_tasks):
            manager = tasks.TaskManager(include_path=folder)
        breaches = []
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=1)
                hint = f"did you mean `{near[0]}`?" if near else "no name is similar."
                where = f"in {folder}, nor " if folder else ""
                breaches.append(f"{place}: {name} is not a task {where}of lm-evaluation-harness; {hint}")
        if breaches:
            raise ConfigError(*breaches)
        return manager

    def _refuse(self, name: str, task: Any) -> None:
        """Raise ConfigError if a task needs something that is unsupported or unsafe."""
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(
                f"{self._place}: {name} executes code that the model generates, which is not supported. Remove it."
            )
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"{self._place}: {name} needs images, and this model reads text only. Remove it.")
        if task.OUTPUT_TYPE == "generate_until":
            given = task.get_config("generation_kwargs") or {}
            other = {key: given[key] for key, plain in _NOT_DRAWN.items() if given.get(key, plain) not in (None, plain)}
            if other and given.get("do_sample"):
                raise ConfigError(
                    f"{self._place}: {name} generates with {json.dumps(other)}, but only temperature is supported. "
                    "Change its generation_kwargs, or remove it."
                )


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the libraries' progress bars and log messages, and forbid them the network."""
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
