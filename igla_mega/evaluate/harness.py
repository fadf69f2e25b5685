"""Tasks of lm-evaluation-harness on a model in any layout.

The harness runs on the main rank alone; the others wait for its questions and take their part in the forward passes
(`Asker`, `serve`). Nothing is downloaded. Imported only where tasks are asked for: lm-eval is an extra.
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

from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Tasks
from igla_mega.data.tokenizer import Tokenizer
from igla_mega.engine.step import Engine
from igla_mega.evaluate import scoring
from igla_mega.evaluate.scoring import Row, Score

FEWSHOT_SEED, PYTHON_SEED, NUMPY_SEED = 1234, 0, 1234
"""The harness's own, so that its published numbers are comparable."""
MAX_NEW_TOKENS = 256
"""Of a task that names no limit, as the harness has it."""
_NOT_DRAWN = {"top_p": 1.0, "top_k": 0, "num_beams": 1, "repetition_penalty": 1.0}
"""Ways to generate that are not built, and what leaves them out."""


class Asker:
    """Asks all ranks; the others are in `serve` until `close`."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self.failed = False
        """Whether a forward pass has failed: what the ranks do next is not known to be the same."""

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """As `scoring.score`."""
        return self._ask(("score", rows, None, 0.0))

    def next_tokens(self, texts: list[list[int]], keys: list[int], *, temperature: float) -> list[int]:
        """As `scoring.next_tokens`."""
        return self._ask(("next", texts, keys, temperature))

    def close(self) -> None:
        """Let the other ranks go on."""
        if not self.failed:
            _told(self._engine, None)

    def _ask(self, question: tuple) -> list:
        self.failed = True
        _told(self._engine, question)
        answers = _answered(self._engine, question)
        self.failed = False
        return answers


def serve(engine: Engine) -> None:
    """Take part in what the main rank asks, until it has no more questions."""
    while (question := _told(engine, None)) is not None:
        _answered(engine, question)


def _told(engine: Engine, question: tuple | None) -> tuple | None:
    if engine.mesh.world_size == 1:
        return question
    box = [question]
    dist.broadcast_object_list(box, src=0, group=engine.mesh.host_group)
    return box[0]


def _answered(engine: Engine, question: tuple) -> list:
    kind, rows, keys, temperature = question
    if kind == "score":
        return scoring.score(engine, rows)
    return scoring.next_tokens(engine, rows, keys, temperature=temperature)


class EngineLM(TemplateLM):
    """The harness's view of a model: it encodes as the exported Hugging Face folder's tokenizer does."""

    def __init__(self, tokenizer: Tokenizer, longest: int, asker: Asker, seed: int):
        super().__init__()
        self._tokenizer, self._longest, self._asker, self._seed = tokenizer, longest, asker, seed
        self._begin = _begin(tokenizer)
        self._encode = lru_cache(maxsize=200_000)(self._encoded)

    @property
    def eot_token_id(self) -> int:
        assert self._tokenizer.eod_id is not None, "`Harness` refuses that"
        return self._tokenizer.eod_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self._begin is None else self._begin

    @property
    def max_length(self) -> int:
        return self._longest

    @property
    def max_gen_toks(self) -> int:
        return MAX_NEW_TOKENS

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._tokenizer.decode([self.prefix_token_id]))
        return list(self._encode(string, add_special_tokens))

    def _encoded(self, string: str, special: bool) -> tuple[int, ...]:
        engine = self._tokenizer.engine
        if special and hasattr(engine, "post_processor"):  # of Hugging Face: it may put a begin token in front
            return tuple(engine.encode(string, add_special_tokens=True).ids)
        return tuple(self._tokenizer.encode(string))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: list[tuple], **_) -> list[tuple[float, bool]]:
        rows = []
        for _, context, continuation in requests:
            if len(continuation) > self._longest:
                raise ValueError(f"an answer of {len(continuation)} tokens; the model reads {self._longest}")
            ids = np.asarray([*context, *continuation][-(self._longest + 1) :], np.int32)
            rows.append(Row(ids, len(continuation)))  # type: ignore[arg-type]
        return [(one.log_prob, one.not_likeliest == 0) for one in self._asker.score(rows)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        windows: list[tuple] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            rolled = utils.get_rolling_token_windows(ids, self.prefix_token_id, self._longest, 1)
            own = [(None, *utils.make_disjoint_window(window)) for window in rolled]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
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
    """Tasks, opened: their examples are there, and only the model is missing."""

    def __init__(self, asked: Tasks, tokenizer: Tokenizer, longest: int, *, place: str = "evaluation.tasks"):
        """Open the tasks.

        Args:
            longest: tokens that the model reads.
            place: what to call the setting in errors.

        Raises:
            ConfigError: no such task, its data is not here, or it needs what is not built.
        """
        if tokenizer.eod_id is None:
            raise ConfigError(
                f"{place}: the tokenizer {tokenizer.path} has no end-of-document token, which stands for an empty "
                "context. Name its eos_token in tokenizer_config.json."
            )
        self._asked, self._tokenizer, self._longest, self._place = asked, tokenizer, longest, place
        with _quiet():
            self._loaded = self._load()
        for name, task in self._loaded["tasks"].items():
            self._refuse(name, task)
            if asked.num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=asked.num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)

    def results(self, asker: Asker, seed: int = 0) -> dict[str, float]:
        """Run the tasks; the main rank calls it, within `scoring.undisturbed`.

        Returns:
            `task/metric` -> value; a metric of another filter than the plain one is `task/metric,filter`.
        """
        random.seed(PYTHON_SEED)
        np.random.seed(NUMPY_SEED)
        for task in self._loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        model = EngineLM(self._tokenizer, self._longest, asker, seed)
        with _quiet():
            found = evaluator.evaluate(
                model, self._loaded, limit=self._asked.limit, bootstrap_iters=0, log_samples=False
            )
        values = {}
        for task, metrics in found["results"].items():
            for key, value in metrics.items():
                metric, _, kind = key.partition(",")
                if kind and isinstance(value, int | float) and not metric.endswith("_stderr"):
                    values[f"{task}/{metric}" if kind == "none" else f"{task}/{key}"] = float(value)
        return values

    def _load(self) -> Any:
        asked, place = self._asked, self._place
        if asked.include_path is not None and not Path(asked.include_path).is_dir():
            raise ConfigError(f"{place}: include_path {asked.include_path} is no folder. Give that of the YAML files.")
        manager = tasks.TaskManager(include_path=asked.include_path, include_defaults=asked.include_path is None)
        if asked.include_path is not None and set(asked.names) - set(manager.all_tasks):
            manager = tasks.TaskManager(include_path=asked.include_path)
        breaches = []
        for name in asked.names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=1)
                hint = f"did you mean `{near[0]}`?" if near else "no name is like it."
                where = f"in {asked.include_path}, nor " if asked.include_path else ""
                breaches.append(f"{place}: {name} is not a task {where}of lm-evaluation-harness; {hint}")
        if breaches:
            raise ConfigError(*breaches)
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in asked.names:
            try:
                opened = manager.load([name])
            except Exception as error:  # a task's YAML may run code of its own, and datasets raises all there is
                first = (str(error).splitlines() or [type(error).__name__])[0]
                breaches.append(
                    f"{place}: {name} does not open: {first}\n  Nothing is downloaded: its data must be in local files "
                    "(dataset_path: json, dataset_kwargs: data_files) or in Hugging Face's cache on this machine."
                )
                continue
            for kind in loaded:
                loaded[kind].update(opened[kind])
        if breaches:
            raise ConfigError(*breaches)
        return loaded

    def _refuse(self, name: str, task: Any) -> None:
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"{self._place}: {name} runs code that the model writes, and is refused. Leave it out.")
        if getattr(task, "MULTIMODAL", False):
            raise ConfigError(f"{self._place}: {name} is about images; this model reads text. Leave it out.")
        if task.OUTPUT_TYPE == "generate_until":
            given = task.get_config("generation_kwargs") or {}
            other = {key: given[key] for key, plain in _NOT_DRAWN.items() if given.get(key, plain) not in (None, plain)}
            if other and given.get("do_sample"):
                raise ConfigError(
                    f"{self._place}: {name} generates with {json.dumps(other)}, and tokens are drawn by temperature "
                    "alone. Change its generation_kwargs, or leave it out."
                )


def _begin(tokenizer: Tokenizer) -> int | None:
    """The id of the begin token that the tokenizer's folder names."""
    config = tokenizer.file.with_name("tokenizer_config.json")
    if not config.is_file() or not hasattr(tokenizer.engine, "token_to_id"):
        return None
    named = json_text.loads(config.read_bytes()).get("bos_token")
    named = named.get("content") if isinstance(named, dict) else named
    return tokenizer.engine.token_to_id(named) if named else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars and advice, and without a network."""
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
