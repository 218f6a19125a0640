"""Templates as transformers renders them, and the limits that no template gets past."""

import threading
import time
from datetime import datetime

import pytest
from bitwatt.errors import CheckpointError, InvalidRequestError
from bitwatt.text.chat_template import ChatTemplate

from tests.server.text.templates import TEMPLATES

MESSAGES = [{"role": "user", "content": "hello"}]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"b": 1, "a": [2.5]}}}]
CONVERSATIONS = [
    MESSAGES,
    [{"role": "system", "content": " Be\nbrief. "}, *MESSAGES],
    [*MESSAGES, {"role": "assistant", "content": "<think>\n\nhm\n</think>\n\nyes"}, *MESSAGES],
    [*MESSAGES, {"role": "assistant", "content": "\n\n yes\n"}],
    [*MESSAGES, {"role": "user", "content": "<tool_response>\n1\n</tool_response>"}],
]


def render(source, messages=MESSAGES, *, tools=None, limit_s=1.0, **kwargs):
    template = ChatTemplate(source, {"bos_token": "<s>"})
    return template.render(messages, tools=tools, kwargs=kwargs, time_limit_s=limit_s)


def rendered_by_transformers(source, messages=MESSAGES, *, tools=None, **kwargs):
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    kwargs = {"add_generation_prompt": True, "bos_token": "<s>", **kwargs}
    [text], _ = render_jinja_template([messages], tools=tools, chat_template=source, **kwargs)
    return text


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("name", sorted(TEMPLATES))
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_published_templates_render_as_in_transformers(name, messages, add_generation_prompt):
    template = TEMPLATES[name]
    kwargs = {"add_generation_prompt": add_generation_prompt, **template.named()}
    assert render(template.source, messages, **kwargs) == (
        rendered_by_transformers(template.source, messages, **kwargs)
    )


@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    "source",
    [
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% set x = 1 %}"
            "{% endgeneration %}{{ x is defined }}{% endfor %}"
        ),
        "{%- generation -%}  a  {%- endgeneration -%}  b",
        "{{ tools is none }}{{ tools is defined }}{{ documents }}{{ documents is defined }}",
        "{{ custom_tools is defined }}{{ add_generation_prompt }}{{ bos_token }}",
        "{{ tools | tojson }}",
        "{{ tools | tojson(ensure_ascii=True) }}",
        "{{ tools | tojson(ensure_ascii=False, separators=(',', ':'), sort_keys=True) }}",
        "{{ tools | tojson(indent=2, sort_keys=True) }}",
        "{{ tools | tojson(False, 4) }}",
        "{{ messages | string }}{{ messages }}{{ tools }}{{ [messages, 'a', 1.5, none] }}",
        "{{ {'a': messages[0].content, 'b': (1, messages)} }}",
        (
            "{% for k, v in {'a': 1, 'b': bos_token}.items() %}{{ k ~ v ~ loop.index }}"
            "{{ loop.last }}{% endfor %}"
        ),
        (
            "{% for i in range(9) if i % 2 %}{{ loop.index }}/{{ loop.length }}:{{ i }}"
            "{{ loop.last }}{{ loop.previtem }}{% if i > 5 %}{% break %}"
            "{% endif %}{% else %}none{% endfor %}"
        ),
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
        (
            "{% for x in [] %}a{% else %}none{% endfor %}{% for a, (b, c) in [(1, (2, 3))] %}"
            "{{ b }}{% endfor %}"
        ),
        (
            "{% macro f(x, y=2) %}<{{ x }}{{ y }}{{ caller() if caller }}>{% endmacro %}{{ f(1) }}"
            "{% call f(3) %}in{% endcall %}"
        ),
        (
            "{% set ns = namespace(a=[], t='') %}{% for m in messages %}"
            "{% set ns.a = ns.a + [m.role] %}{% set ns.t = ns.t + m.content * 2 %}"
            "{% endfor %}{{ ns.a }}{{ ns.t }}"
        ),
        "{% set t %}{{ bos_token }}x{% endset %}{{ t | length }}{{ t.strip('<') }}",
        "{{ '%s and %d' % ('a', 3) }}{{ '%s' | format('b') }}{{ '{} {n}'.format('c', n=1) }}",
        (
            "{{ 'a-b'.replace('-', '+') }}{{ 'aa' | replace('a', 'bb') }}"
            "{{ ['a', 'b'] | join(', ') }}{{ ', '.join(['c', 'd']) }}"
            "{{ 'x'.center(5) }}|{{ 'x' | center(5) }}|{{ '7'.zfill(3) }}"
        ),
        (
            "{{ 'a\nb' | indent(2) }}{{ 'a\nb' | indent(2, true) }}"
            "{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}"
            "{{ 2.567 | round(1) }}{{ 'a b c' | wordwrap(2) }}"
        ),
        (
            "{{ 2 ** 10 }}{{ 7 % 4 }}{{ 1.5 * 2 }}{{ [1] + [2] }}{{ (1,) + (2,) }}"
            "{{ 'a' in 'abc' }}{{ messages[0]['content'] in ['hello', 'x'] }}{{ [0] * 3 }}"
        ),
        (
            "{{ dict(a=1, **{'b': 2}) }}{{ messages | map(attribute='role') | list }}"
            "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
        ),
        "{{ messages[0].missing }}{{ (missing or 'd') ~ messages[0].get('x', 'e') }}",
    ],
)
def test_what_templates_use_does_what_it_does_in_transformers(source, tools):
    assert render(source, tools=tools) == rendered_by_transformers(source, tools=tools)


def test_a_template_may_refuse_and_may_tell_the_time():
    with pytest.raises(InvalidRequestError, match="refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must\nalternate') }}")
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    now = datetime(2024, 7, 26)
    assert template.render([], kwargs={}, time_limit_s=1.0, now=now) == "26 Jul 2024"


GROW = "{{% set ns = namespace(x='a') %}}{{% for i in range(60) %}}{}{{% endfor %}}{{{{ ns.x }}}}"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}",
        "{% for i in range(90000) %}{% for j in range(90000) if x %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(40) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}",
        "{{ 'a' * 3000000000 }}",
        "{{ 3000000000 * [0] }}",
        "{{ ('a' * 10000000) * 3 }}",
        "{{ 10 ** 9999999999 }}",
        "{{ range(10 ** 9) | list }}",
        "{% for i in range(99999) %}{{ 'a' * 10000000 }}{% endfor %}",
        *(
            GROW.format(step)
            for step in (
                "{% set ns.x = ns.x + ns.x %}",
                "{% set ns.x = ns.x ~ ns.x %}",
                "{% set ns.x = [ns.x, ns.x] %}",
                "{% set ns.x = (ns.x, ns.x) %}",
                "{% set ns.x = {'a': ns.x, 'b': ns.x} %}",
                "{% set ns.x = dict(a=ns.x, b=ns.x) %}",
                "{% set ns.x = '{0}{0}'.format(ns.x) %}",
                "{% set ns.x = '{x}{x}'.format_map({'x': ns.x}) %}",
                "{% set ns.x = '%s%s' % (ns.x, ns.x) %}",
                "{% set ns.x = '%s%s' | format(ns.x, ns.x) %}",
                "{% set ns.x = [ns.x, ns.x] | join %}",
                "{% set ns.x = ''.join([ns.x, ns.x]) %}",
                "{% set ns.x = ns.x.replace('a', 'aa') %}",
                "{% set ns.x = ns.x | replace('a', 'aa') %}",
                "{% set t %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = t %}",
            )
        ),
        GROW.format("{% set ns.x = ns.x * ns.x %}").replace("'a'", "3"),
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ 'a'.rjust(10 ** 10) }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ 'a'.zfill(10 ** 10) }}",
        "{{ 'a\tb'.expandtabs(10 ** 9) }}",
        "{{ 'aaaa'.translate({97: 'b' * 10000000}) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ '{:>9999999999}'.format('a') }}",
        "{{ '{:{}}'.format('a', 9999999999) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ 'a\nb' | indent(9999999999) }}",
        "{{ [1] | batch(9999999999, 0) | list }}",
        "{{ [1] | slice(9999999999) | list }}",
        "{{ 1.5 | round(999999999, 'floor') }}",
        "{{ messages | tojson(indent=9999999999) }}",
        "{{ lipsum(9999999) }}",
    ],
)
def test_no_template_takes_time_or_memory_without_end(source):
    with pytest.raises(InvalidRequestError, match="the model's chat template refuses"):
        render(source, limit_s=0.2)


def test_a_busy_machine_is_not_the_templates_fault():
    source = "{% for i in range(3000) %}{{ i }}{% endfor %}"
    is_done = threading.Event()
    others = [threading.Thread(target=_spin, args=(is_done,)) for _ in range(4)]
    for other in others:
        other.start()
    try:
        started, used = time.monotonic(), time.thread_time()
        render(source, limit_s=1e9)
        waited, used = time.monotonic() - started, time.thread_time() - used
        assert waited > used  # so a limit between the two refuses by the clock alone
        assert render(source, limit_s=20 * used)
    finally:
        is_done.set()
        for other in others:
            other.join()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{" + "(" * 3000 + "1" + ")" * 3000 + "}}", "recursion"),
        ("{% for x in y %}" * 30 + "{% endfor %}" * 30, "nested"),
        ("\ud800", "surrogates"),
        ("{{ x | no_such_filter }}", "no_such_filter"),
        ("a" * (4 * 1024 * 1024 + 1), "characters"),
    ],
)
def test_a_template_that_doesnt_compile_says_why_in_one_line(source, reason):
    with pytest.raises(CheckpointError, match=f"doesn't compile: .*{reason}") as error:
        ChatTemplate(source, {})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def _spin(is_done):
    while not is_done.is_set():
        sum(range(1000))
