"""Chat templates of a stranger: their work is bounded, their failures are refusals, published ones are unchanged."""

from __future__ import annotations

import json
from typing import Any

import jinja2
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isthmus.errors import ModelError, RequestMalformed
from isthmus.generation import chat_template
from isthmus.generation.chat_template import ChatTemplate

MESSAGES = [{"role": ("user", "assistant")[i % 2], "content": f" m{i} "} for i in range(5)]

BOMBS = [
    "{{ 'a' * 10 ** 9 }}",
    "{% set x = ['a'] * 10 ** 9 %}",
    "{{ 10 ** (10 ** 9) > 1 }}",
    "{{ 'a' | center(10 ** 9) }}",
    "{{ 'a'.rjust(10 ** 9) }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "{{ ('a' * 10000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 10000) | replace('a', 'b' * 100000) }}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% set n = namespace(a='a') %}{% for i in range(50) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
    "{% set n = namespace(a='a') %}{% for i in range(50) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "{% set n = namespace(a='a') %}{% for i in range(50) %}{% set n.a %}{{ n.a }}{{ n.a }}{% endset %}{% endfor %}",
    "{% set n = namespace(a=[]) %}{% for i in range(50) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
    "{% set n = namespace(a=[]) %}{% for i in range(50) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a | tojson }}",
]
FAILURES = [
    "{{ 1 / 0 }}",
    "{{ 'a' + 1 }}",
    "{{ 10.0 ** 400 }}",
    "{{ '\\ud800' }}",
    "{{ lipsum(9) }}",
    "{% include 'x' %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
]
PUBLISHED = [
    "{% if messages[0]['role'] == 'user' %}{% set rest = messages[1:] %}{% endif %}{% for m in rest %}"
    "{{ bos_token ~ '[INST] ' + m['content'].strip() + ' [/INST]' }}{{ loop.index0 % 2 }}{% endfor %}",
    "{% set ns = namespace(last=messages | length - 1) %}{% for m in messages[::-1] %}{% if '1' in m.content %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% if loop.last %}{{ m.content.split('m')[-1] }}{% endif %}{% endfor %}"
    "{{ ns.last }}",
    "{% macro turn(m, end='.') %}{{ m.role | upper }}{{ end }}{% endmacro %}{% for m in messages %}{{ turn(m) }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}{{ messages[0] | tojson }}{{ none }}{{ [1, 'a'] }}",
    "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}"
    "{{ ['a', 'b'] | join('-') }}"
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ '%s: %d' | format('x', 3) }}",
]


@pytest.mark.parametrize("source", BOMBS)
def test_a_template_ends_where_its_work_is_too_much(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_WORK", 2**18)
    with pytest.raises(RequestMalformed, match="units of work"):
        ChatTemplate(source).render(messages=MESSAGES)


@pytest.mark.parametrize("source", FAILURES)
def test_a_template_that_fails_refuses_the_messages(source: str) -> None:
    with pytest.raises(RequestMalformed, match="refuses these messages") as e:
        ChatTemplate(source).render(messages=MESSAGES)
    assert e.value.facts["parameter"] == "messages"
    assert len(e.value.message) < 300


def test_a_template_too_deep_to_compile_is_the_models_error() -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        ChatTemplate("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}")


@pytest.mark.parametrize("source", PUBLISHED)
def test_the_budget_changes_no_text(source: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    plain.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    variables: dict[str, Any] = {"messages": MESSAGES, "bos_token": "<s>"}
    assert ChatTemplate(source).render(**variables) == plain.from_string(source).render(**variables)


def test_a_template_that_is_met_again_has_its_whole_budget_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_WORK", 2000)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert {template.render(messages=MESSAGES) for _ in range(50)} == {" m0  m1  m2  m3  m4 "}


def test_a_template_names_jinjas_errors_as_before() -> None:
    with pytest.raises(RequestMalformed, match="roles must alternate") as e:
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render()
    assert isinstance(e.value.__cause__, jinja2.TemplateError)
