"""Templates that take more time or memory than a chat needs are refused; those that people use mean what they meant."""

import json
import time

import hostile
import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igla_mega.untrusted import sandbox

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BIG, LARGE = "{% set s = 'a' * 16000000 %}", "{% set s = 'a' * 100000 %}"
MANY = "{% for i in range(100000) %}"
TOWER = "{% for i in range(60) %}{% set ns.x = "

HOSTILE = [
    # Widths and counts, as whole numbers or not.
    "{{ messages | tojson(indent=2e9) }}",
    "{{ messages | tojson(indent=10000000) }}",
    "{{ messages | tojson(indent=True) }}",
    "{{ messages | tojson(indent='x' * 10000000) }}",
    "{{ messages | tojson(separators=['x' * 10000000, 'y']) }}",
    "{{ ([messages] * 1000) | tojson(indent=1000) }}",
    "{{ lipsum(n=1e7) }}",
    "{{ lipsum(n=10000000) }}",
    "{{ 'a' | center(10000000) }}",
    "{{ 'a' | indent(1e7) }}",
    "{{ ('a\n' * 1000000) | indent(10000) }}",
    "{{ ('a\n' * 1000000) | indent('x' * 10000) }}",
    "{{ [1] | batch(100000000, 0) | list }}",
    "{{ [1] | slice(100000000) | list }}",
    "{{ 1 | round(100000000) }}",
    "{{ 'a'.ljust(10 ** 9) }}",
    "{{ 'a'.zfill(1e9 | int) }}",
    "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "{{ strftime_now('%1000000000Y') }}",
    # Results that are products.
    "{{ 'aaaa'.replace('', 'b' * 10000000) }}",
    "{{ ('a' * 10000000).replace('a', 'b' * 10000000) }}",
    "{{ ('a' * 10000000) | replace('a', 'b' * 10000000) }}",
    "{{ ('a' * 10000000).encode().replace('a'.encode(), ('b' * 10000000).encode()) }}",
    "{{ ('x' * 10000000).join(['a'] * 200000) }}",
    "{{ (['a'] * 200000) | join('x' * 10000000) }}",
    "{{ ('%s' * 100000) % (('a' * 1000000,) * 16) }}",
    "{{ ('{0}' * 100000).format('a' * 1000000) }}",
    "{{ ('{:9999999}' * 1000).format(*range(1000)) }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:{}}'.format('a', 99999999999) }}",
    "{{ ('a' * 10000000).translate({97: 'b' * 10000}) }}",
    "{{ 'a' ~ " + " ~ ".join(["'b' * 10000000"] * 40) + " }}",
    "{{ (2 ** 8000) ** 2 }}",
    "{{ ('f' * 100000) | int(base=16) }}",
    "{{ ([[0]] * 100000) | sum(start=[]) }}",
    # What costs more than its size.
    "{{ (('<!---->' * 1000000) | safe).striptags() }}",
    "{{ ('<!---->' * 1000000) | striptags }}",
    "{{ ('a' * 1000000).encode('idna') }}",
    # Nested values, which grow when they are printed or compared.
    "{% set ns = namespace(x=[0]) %}" + TOWER + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[0]) %}" + TOWER + "{'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x == ns.x }}",
    "{% set ns = namespace(x=0) %}" + TOWER + "namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=0) %}{% set ns.x = ns %}{{ ns }}",
    # Repetition.
    MANY * 3 + "{% endfor %}" * 3,
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% macro m() %}" + "{{ 1 + 1 }}" * 100 + "{% endmacro %}" + MANY + "{% set x = m() %}{% endfor %}",
    "{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    BIG + MANY + "{{ s }}{% endfor %}",
    BIG + MANY + "{% if s == s ~ 'b' %}{% endif %}{% endfor %}",
    BIG + "{% set t = 'a' * 16000000 %}" + MANY + "{% if s == t %}{% endif %}{% endfor %}",
    BIG + "{% for c in s %}{% endfor %}",
    LARGE + MANY + "{% if s is eq(s + 'a') %}{% endif %}{% endfor %}",
    LARGE + MANY + "{% if 'aab' in s %}{% endif %}{% endfor %}",
    LARGE + MANY + "{% set x = s[::-1] %}{% endfor %}",
    LARGE + MANY + "{% set x = s.upper() %}{% endfor %}",
    LARGE + MANY + "{% set x = s | upper %}{% endfor %}",
    "{% set s %}" + MANY + "{{ 'x' * 1000 }}{% endfor %}{% endset %}{{ s }}",
    "{% filter upper %}" + MANY + "{{ 'x' * 1000 }}{% endfor %}{% endfilter %}",
    MANY + "y" * 50_000 + "{% endfor %}",
    MANY + "{{ range(90000) | sort | length }}{% endfor %}",
    "{{ range(100000) | map('string') | map('center', 9999) | join }}",
    "x" * 70_000,
]


def render(source: str, messages=MESSAGES) -> str:
    environment = sandbox.Sandbox()
    template = environment.from_string(source)
    environment.begin(messages)
    return template.render(messages=messages)


@pytest.mark.parametrize("source", HOSTILE)
def test_a_hostile_template_is_refused_in_bounded_time_and_memory(source):
    def refused() -> str:
        started = time.process_time()
        try:
            return f"rendered {len(render(source))} characters"
        except (jinja2.TemplateError, RecursionError) as error:
            return f"{type(error).__name__} after {time.process_time() - started:.0f}"

    said = hostile.within(300, refused, seconds=30)
    assert " after " in said, said
    assert int(said.split(" after ")[1]) <= 10, said


USED = {
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' ~ m.content | trim }}{% endfor %}": "<|user|>a<|assistant|>b",
    "{{ messages | tojson }}": json.dumps(MESSAGES),
    "{{ messages | tojson(indent=4) }}": json.dumps(MESSAGES, indent=4),
    "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }}": '{"content":"a","role":"user"}',
    "{{ messages | map(attribute='role') | join(', ') }}": "user, assistant",
    "{{ messages[::-1][0].role }}{{ messages[1:] | length }}{{ 'abc'[:2] }}": "assistant1ab",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}": "1",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}": "2",
    "{{ [1, [2, messages[0].content]] }}{{ {'a': [messages[0].role]} }}{{ (1, messages[0].role) }}":
        "[1, [2, 'a']]{'a': ['user']}(1, 'user')",
    "{% macro f(x, n=2) %}{{ x * n }}{% endmacro %}{{ f('ab') }}{{ f('x', n=3) }}": "ababxxx",
    "{{ '%s-%05.1f' % ('a', 3) }}{{ '{:>5}|{x}'.format('a', x=1) }}": "a-003.0    a|1",
    "{{ 'a b'.split(' ') }}{{ 'x'.join(['1', '2']) }}{{ 'aXb'.replace('X', '--') }}": "['a', 'b']1x2a--b",
    "{{ 'text' | indent(2, first=true) }}{{ 'b' | center(5) }}{{ 3.14159 | round(2) }}": "  text  b  3.14",
    "{% for a, b in {'x': 1}.items() %}{{ a ~ b ~ undefined_name ~ none }}{% endfor %}": "x1None",
    "{{ 1 if messages[0].role in ('user', 'system') and 'a' in messages[0].content else 2 }}": "1",
    "{% for n in range(3) if n != 1 %}{{ loop.index }}{{ n }}{% if n == 2 %}{% break %}{% endif %}{% endfor %}": "1022",
    "{{ missing is defined }}{{ missing == 'a' }}{{ missing }}{{ messages is iterable }}": "FalseFalseTrue",
    "{% set a, b = 1, messages[0].role %}{% set t %}x{{ a }}{% endset %}{{ b ~ t }}": "userx1",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ ['b', 'a'] | sort | first }}": "aa",
}  # fmt: skip


@pytest.mark.parametrize("source", USED)
def test_what_templates_use_is_what_transformers_renders(source):
    assert render(source) == USED[source]
    if "generation" not in source:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        assert _compile_jinja_template(source).render(messages=MESSAGES) == USED[source]


def test_a_long_conversation_is_rendered_in_full():
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}. " * 40} for i in range(2000)]
    source = (
        "{% set ns = namespace(last='') %}{% for m in messages %}{% if m.role == 'user' and loop.first %}<{% endif %}"
        "{% set content = m.content | trim %}{% if '</think>' in content %}{{ content.split('</think>')[-1] }}"
        "{% else %}{{ m.role ~ ': ' ~ content + '\n' }}{% endif %}{% endfor %}"
    )
    text = render(source, messages)
    assert text.count("\n") == 2000 and len(text) > 600_000


@given(st.recursive(st.text(max_size=5) | st.integers(0, 9), lambda inner: st.lists(inner, max_size=4), max_leaves=20))
def test_the_weight_of_a_value_is_at_least_what_it_prints(value):
    assert sandbox._weight([value]) >= len(json.dumps([value], ensure_ascii=False)) / 4


def test_transformers_has_no_filter_that_is_missing_here_except_the_removed_ones():
    plain = jinja2.Environment()  # noqa: S701 (no HTML)
    assert plain.filters.keys() - sandbox.Sandbox().filters.keys() == set(sandbox._REMOVED)
    assert plain.globals.keys() - sandbox.Sandbox().globals.keys() == {"lipsum"}
