"""Templates of strangers: bounded time and memory, and templates of real models as jinja2 alone renders them."""

from __future__ import annotations

import json
import resource
import time
import tracemalloc
from typing import Any

import pytest

pytest.importorskip("jinja2")

from pykvsmooth import sandbox
from pykvsmooth.sandbox import Compiled
from pykvsmooth.template import Jinja, TemplateError

SECONDS = 2.5  # of processor time for compiling and rendering
BYTES = 128 << 20

LOOP = "{% for a in range(100000) %}%s{% endfor %}"


def grown(start: str, step: str, turns: int = 60) -> str:
    """x becomes step of x, again and again."""
    return (
        "{% set n = namespace(x=" + start + ") %}{% for i in range(" + str(turns) + ") %}{% set n.x = " + step + " %}{% endfor %}{{ n.x }}"
    )


HOSTILE = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops in loops": LOOP.replace("%s", LOOP.replace("%s", LOOP.replace("%s", ""))),
    "silent loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% if a == b %}{% endif %}{% endfor %}{% endfor %}",
    "loops with conditions": "{% for a in range(99999) if a in range(99999)|list %}"
    "{% for b in range(99999) if b > b %}{% endfor %}{% endfor %}",
    "loops of straight code": "{% for a in range(99999) %}" + "{% if a %}{% set b = a.c %}{% endif %}" * 1000 + "{% endfor %}",
    "text in a loop": LOOP.replace("%s", "y" * 50_000),
    "text in a block": "{% set z %}" + LOOP.replace("%s", "y" * 50_000) + "{% endset %}",
    "text of macros": "{% macro m() %}" + "y" * 50_000 + "{% endmacro %}{% for i in range(99999) %}{% set x = m() %}{% endfor %}",
    "times": "{{ 'a' * 10**10 }}",
    "times, turned round": "{{ 10**10 * 'a' }}",
    "times of a list": "{{ ([0] * 10**9)|length }}",
    "times in a constant": "{% set x = ('a' * 1000) * 10**9 %}",
    "doubling": grown("'ab'", "n.x ~ n.x"),
    "doubling by plus": grown("'ab'", "n.x + n.x"),
    "doubling of lists": grown("[1]", "n.x + n.x"),
    "nested twice": grown("'ab'", "[n.x, n.x]"),
    "nested twice, never shown": grown("[1]", "[n.x, n.x]").replace("{{ n.x }}", "{{ n.x == n.x }}"),
    "nested twice in dicts": grown("{}", "{'a': n.x, 'b': n.x}"),
    "nested deeply": grown("[]", "[n.x]", 90_000),
    "namespaces from above": "".join(f"{{% set n{i} = namespace() %}}" for i in range(60))
    + "".join(f"{{% set n{i}.a = [n{i + 1}, n{i + 1}] %}}" for i in range(59))
    + "{{ n0 }}",
    "a namespace in itself": "{% set n = namespace() %}{% set n.a = n %}{{ n }}",
    "many values": "{% set n = namespace(l=[]) %}{% for i in range(99999) %}{% set n.l = n.l + ['a' * 1000] %}{% endfor %}",
    "many variables": "".join(f"{{% set a{i}='a'*999999 %}}" for i in range(60)),
    "power": "{{ 9**(9**9) }}",
    "power by steps": grown("9", "n.x * n.x"),
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent with a star": "{{ '%*d' % (10**9, 1) }}",
    "percent with precision": "{{ '%.1000000000f' % 1 }}",
    "format": "{{ '%1000000000d'|format(1) }}",
    "format by argument": "{{ '%*s'|format(10**9, 'a') }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "format_map": "{{ '{a:{b}}'.format_map({'a': 1, 'b': 10**9}) }}",
    "center": "{{ 'a'|center(10**10) }}",
    "center of str": "{{ 'a'.center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**10) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "indent": "{{ 'a\\nb'|indent(10**10) }}",
    "indent by text": "{{ 'a\\nb'|indent('a' * 100000) }}",
    "batch": "{{ [1]|batch(10**10, 0)|list }}",
    "slice": "{{ [1]|slice(10**10)|list }}",
    "wordwrap": "{{ 'a'|wordwrap(1)|center(10**9) }}",
    "replace": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "replace as a filter": "{{ ('a' * 100000)|replace('', 'b' * 100000) }}",
    "join": "{{ ('a' * 100000).join('b' * 100000) }}",
    "join as a filter": "{{ range(99999)|join('b' * 100000) }}",
    "join of a generator": "{{ range(99999)|map('string')|join('b' * 100000) }}",
    "map": "{{ range(99999)|map('replace', '', 'b' * 900000)|list }}",
    "lipsum": "{{ lipsum(10**9) }}",
    "tojson with indent": "{{ [1]|tojson(indent=10**9) }}",
    "sum of lists": "{{ (range(9999)|map('list')|list)|sum(start=[]) }}",
    "sort in a loop": "{% set l = range(60000)|list %}{% for i in range(99999) %}{% set x = l|sort(reverse=true) %}{% endfor %}",
    "in, in a loop": "{% set s = 'a' * 900000 %}{% for i in range(99999) %}{% set x = ('a' * 1000 ~ 'b') in s %}{% endfor %}",
    "find, in a loop": "{% set s = 'a' * 900000 %}{% for i in range(99999) %}{% set x = s.count('ab') %}{% endfor %}",
    "a macro that calls itself": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
    "a recursive loop over itself": "{% set l = [1, 2] %}{% for x in l recursive %}"
    "{% if loop.depth < 45 %}{{ loop(l) }}{% endif %}{% endfor %}",
    "a block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "includes": "{% include '/etc/passwd' %}",
    "imports": "{% import '/etc/passwd' as x %}",
    "extends": "{% extends 'x' %}",
    "strftime": "{{ strftime_now('%A' * 100000) }}",
    "an error of a million words": "{{ raise_exception('bad ' * 200000) }}",
    "an error that is no text": "{{ raise_exception([1]) }}",
    "attributes": "{{ ''.__class__.__mro__ }}",
    "attributes by name": "{{ (''|attr('__class__')).__mro__ }}",
    "attributes by format": "{{ ('%s' % 'a')['__class__']['__mro__'] }}",
    "globals of a function": "{{ raise_exception.__globals__.x }}",
    "changes": "{{ messages.append(1) }}",
    "no end": "{% for %}",
    # while it is compiled
    "a long source": "a" * 70_000,
    "brackets": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "lists": "{{ " + "[" * 20_000 + "]" * 20_000 + " }}",
    "open brackets": "{{ " + "[" * 60_000,
    "not": "{{ " + "not " * 15_000 + "1 }}",
    "signs": "{{ " + "-" * 30_000 + "1 }}",
    "powers": "{{ " + "1**" * 20_000 + "1 }}",
    "sums": "{{ " + "a+" * 30_000 + "a }}",
    "attributes of attributes": "{{ a" + ".a" * 30_000 + " }}",
    "filters of filters": "{{ a" + "|string" * 9_000 + " }}",
    "choices": "{{ " + "1 if a else " * 5_000 + "1 }}",
    "blocks in blocks": "{% if a %}" * 6_000 + "{% endif %}" * 6_000,
    "loops in source": "{% for a in b %}" * 1_000 + "{% endfor %}" * 1_000,
    "conditions on one line": "{% if 1 %}" + "{% elif 1 %}" * 1_000 + "{% endif %}{{ nothing.of.this }}",
    "a long number": "{{ " + "9" * 60_000 + " }}",
    "a constant that grows": "{{ 'a'|replace('a', 'aaaaaaaa')" + "|replace('a', 'aaaaaaaa')" * 50 + " }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a TemplateError of one readable line, in time."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.1)
    begin, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateError) as caught:
        Jinja(HOSTILE[name]).first("Hi", 0, None)
    assert time.thread_time() - begin < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < BYTES >> 10  # KiB
    message = str(caught.value)
    assert len(message) < 400 and "\n" not in message and "template='vicuna'" in message


@pytest.mark.parametrize("name", ["many values", "many variables", "text in a block", "nested twice", "join as a filter"])
def test_memory_of_hostile_templates(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Python counts it; the process's peak says nothing once it was higher."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 10)  # it is slow while it is traced, and shall end by what it makes
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError, match=r"too much|makes a value|nested too deeply"):
            Jinja(HOSTILE[name]).first("Hi", 0, None)
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()


def test_sources_as_long_as_they_may_be() -> None:
    """Compiling can't be interrupted: what bounds it is the length of the source."""
    begin = time.thread_time()
    Compiled("{{a~a}}" * (sandbox.MAX_SOURCE // 7))
    assert time.thread_time() - begin < 10


def test_the_meter_is_of_one_rendering() -> None:
    """Many long conversations are no hostile template."""
    template = Compiled("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    for _ in range(30):
        assert len(template.render(messages=[{"content": "a" * 100_000}] * 4)) == 400_000
    assert len(template.render(messages=[{"content": "a" * 3_000_000}])) == 3_000_000


# ---- templates of real models, in their idioms ----

MESSAGES = [
    {"role": "system", "content": "Be kind.\n"},
    {"role": "user", "content": "  What is it? "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA dog."},
    {"role": "user", "content": "And 'now'?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Looks",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": ["string", "null"]}, "b": {"type": "array", "items": {"type": "number"}}},
            },
        },
    }
]
REAL = {
    "chatml": "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 2": """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}
{%- else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}
{%- else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{ ' ' + content.strip() + ' ' + eos_token }}
{%- endif %}{% endfor %}""",
    "llama 3": """{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools is not none %}{%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\n\n" }}{%- endfor %}{%- endif %}
{{- "Today Date: " + date_string + "\n\n" }}{{- system_message }}{{- "<|eot_id|>" }}{%- for message in messages %}
{%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- elif 'tool_calls' in message %}{%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call at once") }}{%- endif %}
{%- endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}""",
    "mistral": """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}
{%- set loop_messages = messages[1:] %}{%- else %}{%- set loop_messages = messages %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}{%- set ns = namespace() %}{%- set ns.index = 0 %}
{%- for message in loop_messages %}
{%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
{%- if (message["role"] == "user") != (ns.index % 2 == 0) %}{{- raise_exception("roles must alternate") }}{%- endif %}
{%- set ns.index = ns.index + 1 %}{%- endif %}{%- endfor %}{{- bos_token }}{%- for message in loop_messages %}
{%- if message["role"] == "user" %}{%- if tools is not none and (message == user_messages[-1]) %}{{- "[AVAILABLE_TOOLS] [" }}
{%- for tool in tools %}{%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
{%- for key, val in tool.items() if key != "return" %}{%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
{%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}{{- "}}" }}
{%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}{%- endfor %}{{- "[/AVAILABLE_TOOLS]" }}{%- endif %}
{%- if loop.last and system_message is defined %}{{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
{%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}{%- elif message["role"] == "assistant" %}
{{- " " + message["content"]|trim + eos_token}}{%- endif %}{%- endfor %}""",
    "gemma": """{{ bos_token }}{% for message in messages if message['role'] != 'system' %}{% if (message['role'] == 'assistant') %}
{%- set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}
{{- '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}""",
    "reasoning": """{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}{%- for message in messages[::-1] %}
{%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.multi_step and message.role == "user" and message.content is string and
 not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}{%- set ns.multi_step = false %}
{%- set ns.last = index %}{%- endif %}{%- endfor %}{%- for message in messages %}{%- set content = message.content %}
{%- if message.role == "assistant" %}{%- set reasoning = '' %}{%- if '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- if loop.index0 > ns.last %}
{{- '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{%- endif %}{%- endif %}
{{- '<|im_start|>' ~ message.role ~ '\n' ~ content ~ '<|im_end|>\n' }}{%- endfor %}""",
    "macros": """{%- macro kind(spec) %}{%- if spec.type is iterable and spec.type is not string %}{%- for t in spec.type %}
{{- kind({'type': t}) }}{%- if not loop.last %}{{- ' or ' }}{%- endif %}{%- endfor %}
{%- elif spec.type == 'array' %}{{- 'list[' + kind(spec['items']) + ']' }}{%- elif spec.type == 'object' %}
{%- for name, inner in spec.properties|items %}{{- name|upper }}: {{ kind(inner) }}{{ '' if loop.last else '; ' }}{%- endfor %}
{%- else %}{{- {'string': 'str', 'number': 'float'}.get(spec.type, 'Any') }}{%- endif %}{%- endmacro %}
{%- for tool in tools %}{{- tool.function.name ~ '(' ~ kind(tool.function.parameters) ~ ')' }}{%- endfor %}
{%- set roles = messages|map(attribute='role')|unique|list %}{{ roles|join(', ') }},
{{ messages|rejectattr('role', 'in', ['system'])|list|count }}
{{- '%s of %02d' % ('a', 7) }}{{ '%s'|format(messages|first|string|length) }}{{ messages[-1].content|replace("'", '"')|indent(2, true) }}
{{- dict(a=1, b=[1, 2]) | tojson }}{{ [3, 1, 2]|sort|first }}{{ 'a,b'.split(',')|last }}{{ -(2**10) // 3 }}{{ {'b': 1, 'a': 2}|dictsort }}
{%- for x in [[1, [2, 3]], [4]] recursive %}{% if x is iterable %}({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}
{%- for m in messages %}{{ loop.previtem.role if loop.previtem else '-' }}{{ loop.cycle('a', 'b') }}{{ loop.revindex }}{{ loop.length }}
{%- if loop.changed(m.role) %}!{% endif %}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}{% macro twice() %}
{{ caller() ~ caller() }}{% endmacro %}{% call twice() %}x{% endcall %}
{%- filter upper %}ab{{ messages|length }}{% endfilter %}{% set b %}c{{ 1 }}{% endset %}{{ b ~ b }}{% raw %}{{ x }}{% endraw %}
{{ missing }}""",
}


def plain(source: str, **names: Any) -> str:
    """As transformers does it."""
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = fail
    return environment.from_string(source).render(**names)


@pytest.mark.parametrize("name", REAL)
def test_real_templates_are_as_they_were(name: str) -> None:
    names = {"messages": MESSAGES, "tools": TOOLS, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    assert Compiled(REAL[name]).render(**names) == plain(REAL[name], **names)


def test_the_date() -> None:
    assert Compiled("{{ strftime_now('%Y') }}").render().startswith("20")
