"""One rule for what is too long, over random lengths and limits."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from igla_mega.config.errors import ConfigError
from igla_mega.data.tuning.chat import Sample
from igla_mega.data.tuning.limits import Limits, limit_pair, limit_sample
from igla_mega.data.tuning.pairs import Pair

END = 9
ENDS = frozenset({END, 8})
LENGTHS = st.integers(1, 20)
EXAMPLES = settings(max_examples=60, deadline=None)
WAYS = st.sampled_from(["error", "skip", "cut"])


def text(draw: st.DataObject, length: int, end: int | None = END) -> np.ndarray:
    ids = draw.draw(st.lists(st.integers(0, 7), min_size=length, max_size=length))
    return np.array([*ids, *([] if end is None else [end])], dtype=np.int64)


def of_an_answer(short: np.ndarray, whole: np.ndarray) -> bool:
    """An answer is whole, or its beginning and its end token."""
    if len(short) == len(whole):
        return short.tolist() == whole.tolist()
    if int(whole[-1]) not in ENDS:
        return short.tolist() == whole[: len(short)].tolist()
    return len(short) > 1 and short.tolist() == [*whole[: len(short) - 1].tolist(), END]


@EXAMPLES
@given(st.data(), LENGTHS, LENGTHS, LENGTHS, st.integers(1, 45), st.none() | st.integers(1, 25), WAYS, st.booleans())
def test_a_pair_is_whole_or_refused_with_its_numbers_or_left_out_or_cut(
    data, prompt, chosen, rejected, most, most_prompt, way, has_end
):
    end = END if has_end else None
    pair = Pair(text(data, prompt, None), text(data, chosen, end), text(data, rejected, end))
    longest = max(len(pair.chosen), len(pair.rejected))
    too_long = prompt + longest > most or prompt > (most_prompt or prompt)
    try:
        kept = limit_pair(pair, Limits(most, most_prompt, way), ENDS, "f:7")
    except ConfigError as error:
        assert too_long and way == "error"
        words = str(error).replace(".", " ").split()
        assert words[0] == "f:7:" and str(prompt) in words and {str(most), str(most_prompt)} & set(words)
        return
    if not too_long:
        assert kept is pair
        return
    assert way != "error"
    if way == "skip":
        assert kept is None
    elif kept is not None:
        assert 1 <= len(kept.prompt) <= (most_prompt or prompt)
        assert kept.prompt.tolist() == pair.prompt[prompt - len(kept.prompt) :].tolist(), "a prompt loses its beginning"
        assert len(kept.prompt) + max(map(len, kept[1:])) <= most
        assert all(map(of_an_answer, kept[1:], pair[1:])) and kept.chosen.tolist() != kept.rejected.tolist()
        if max(map(len, kept[1:])) < longest:
            assert len(kept.prompt) == min(prompt, most_prompt or prompt, max(most // 2, most - longest))


@EXAMPLES
@given(st.data(), LENGTHS, LENGTHS, st.integers(10, 45))
def test_a_pair_is_left_out_only_if_its_answers_would_become_equal(data, chosen, rejected, most):
    pair = Pair(text(data, 20, None), text(data, chosen), text(data, rejected))
    if limit_pair(pair, Limits(most, None, "cut"), ENDS, "f:7") is None:
        room = max(most // 2, most - 20)
        assert pair.chosen[: room - 1].tolist() == pair.rejected[: room - 1].tolist()


@EXAMPLES
@given(st.data(), st.lists(st.tuples(st.integers(0, 12), LENGTHS), min_size=1, max_size=4), st.integers(1, 60), WAYS)
@example(None, [(0, 1)], 1, "cut")
def test_a_conversation_is_whole_or_refused_or_left_out_or_ends_with_an_answer(data, turns, most, way):
    tokens, targets = [], []
    for number, (context, answer) in enumerate(turns):
        context += number > 0  # without a token between them two answers are one
        ids = (
            range(answer) if data is None else data.draw(st.lists(st.integers(0, 7), min_size=answer, max_size=answer))
        )
        tokens += [7] * context + [*ids, END]
        targets += [False] * context + [True] * (answer + 1)
    sample = Sample(np.array(tokens), np.array(targets))
    try:
        kept = limit_sample(sample, Limits(most, too_long=way), ENDS, "f:7")
    except ConfigError as error:
        assert way == "error" and f"f:7: {len(tokens)} tokens exceed data.max_length {most}" in str(error)
        return
    if len(tokens) <= most:
        assert kept is sample
        return
    assert way != "error" and (way != "skip" or kept is None)
    if kept is None:
        return
    assert len(kept.tokens) == len(kept.targets) <= most and kept.targets[1:].any()
    assert kept.targets[-1] and kept.tokens[-1] == END
    first = turns[0][0] + turns[0][1] + 1
    if first <= most:
        assert (
            kept.tokens.tolist() == tokens[: len(kept.tokens)] and kept.targets.tolist() == targets[: len(kept.tokens)]
        )
        return
    prompt = int((~kept.targets).sum())
    assert prompt >= min(turns[0][0], 1) and not kept.targets[:prompt].any()
    assert of_an_answer(kept.tokens[prompt:], sample.tokens[turns[0][0] : first])


def test_no_limit_leaves_everything_whole():
    sample = Sample(np.arange(5), np.arange(5) > 2)
    assert limit_sample(sample, Limits(None), ENDS, "f:1") is sample
    pair = Pair(np.arange(5), np.arange(3), np.arange(2))
    assert limit_pair(pair, Limits(None), ENDS, "f:1") is pair
    with pytest.raises(
        ConfigError, match=r"f:1: the prompt alone has 5 tokens, more than the 4 of data.max_prompt_length"
    ):
        limit_pair(pair, Limits(None, 4), ENDS, "f:1")


@EXAMPLES
@given(st.data(), LENGTHS, LENGTHS, st.integers(1, 30), st.none() | st.integers(1, 20), st.integers(0, 2))
def test_a_prompt_that_loses_its_beginning_keeps_its_begin_of_text(data, prompt, answer, most, most_prompt, width):
    begin = (100, 101)[:width]
    pair = Pair(np.array([*begin, *text(data, prompt, None)]), np.append(text(data, answer), END), np.array([1, END]))
    plain = limit_pair(pair, Limits(most, most_prompt, "cut"), ENDS, "f:7")
    kept = limit_pair(pair, Limits(most, most_prompt, "cut"), ENDS, "f:7", begin=begin)
    sample = Sample(np.concatenate(pair[:2]), np.arange(len(pair.prompt) + len(pair.chosen)) >= len(pair.prompt))
    short = limit_sample(sample, Limits(most, too_long="cut"), ENDS, "f:7", begin=begin)
    assert (kept is None) == (plain is None)
    for found in ([] if kept is None else [kept.prompt]) + ([] if short is None else [short.tokens[~short.targets]]):
        own = found.tolist()
        if len(own) > width:
            assert tuple(own[:width]) == begin, "a model never reads a text without them"
            own = own[width:]
        assert own == pair.prompt[len(pair.prompt) - len(own) :].tolist()
    if kept is not None and plain is not None:
        assert len(kept.prompt) == len(plain.prompt)
