"""Chat templates of strangers: what they may not reach, and that they end. The files come from GGUF."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from engine.models.importer import import_gguf
from gateway.chat_template import ChatTemplate, ChatTemplateError
from gateway.errors import ModelFilesError
from gateway.text import TextModel
from tests.unit.test_models_gguf import tiny, write_gguf

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory.mktemp("hostile") / "model")


def test_a_template_of_a_gguf_file_is_refused_when_it_is_used(model: Path, tmp_path: Path) -> None:
    template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    file = write_gguf(model, tmp_path / "m.gguf", metadata={"tokenizer.chat_template": template})
    import_gguf(file, tmp_path / "imported", "hash", lambda done, total: None)
    text = TextModel.from_folder(tmp_path / "imported")
    with pytest.raises(ChatTemplateError, match=r"the chat template refused these messages"):
        text.encode_chat(MESSAGES)
    assert text.encode("the"), "the model serves on without it"


UNREACHABLE = [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ messages.append(1) }}",
    "{{ (messages | map(attribute='__class__') | list)[0].__mro__ }}",
    "{% import 'os' as os %}",
    "{% include '/etc/passwd' %}",
    "{{ lipsum(100000) }}",
]

ENDLESS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}",
    "{% for a in range(10**9) %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a' * 10**10 }}",
    "{{ ['a'] * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set n = namespace(s='aaaaaaaa') %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s='aaaaaaaa') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s=[1]) %}{% for a in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}{{ n.s }}",
    "{% set n = namespace(s='a') %}{% for a in range(60) %}{% set n.s = n.s.replace('a', 'aaaa') %}{% endfor %}",
    "{% set n = namespace(s='a') %}{% for a in range(60) %}{% set n.s = n.s|replace('a', 'aaaa') %}{% endfor %}",
    "{% set n = namespace(s='a') %}{% for a in range(60) %}{% set n.s = [n.s, n.s]|join(n.s) %}{% endfor %}",
    "{% set n = namespace(s='a') %}{% for a in range(60) %}{% set n.s = n.s.join([n.s, n.s]) %}{% endfor %}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ '%10000000000d' % 1 }}",
    "{{ '%*d' % (10**10, 1) }}",
    "{{ '{:>10000000000}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 10**10) }}",
    "{{ '{a:>{b}}'.format_map({'a': 1, 'b': 10**10}) }}",
    "{{ '%10000000000d'|format(1) }}",
    "{% set s = 'a' * 10**6 %}{% for a in range(99999) %}{{ s }}{% endfor %}",
    "{% set s = 'a' * 10**6 %}{% for a in range(99999) %}{% set t = s + 'b' %}{% endfor %}",
]


@pytest.mark.parametrize("template", [*UNREACHABLE, *ENDLESS])
def test_what_is_refused(template: str) -> None:
    began = time.monotonic()
    with pytest.raises(
        (ChatTemplateError, ModelFilesError), match=r"the chat template (refused|does not compile)"
    ):
        rendered = ChatTemplate(template, {}).render(MESSAGES)
        assert not rendered, "what is undefined prints nothing"
        raise ChatTemplateError("the chat template refused these messages: it printed nothing")
    assert time.monotonic() - began < 60, "a guard against endlessness, not a measure"


def test_what_real_templates_do_still_works() -> None:
    template = (
        "{%- macro turn(m) -%}<{{ m['role'] ~ '>' ~ m.content | trim }}{%- endmacro -%}"
        "{%- for m in messages if m.role != 'x' -%}{{ turn(m) }}{{ '-' * 3 }}{%- endfor -%}"
        "{{ messages | tojson }}{{ '%s:%d' % ('a', 7) }}{{ 'b'.replace('b', 'c') + ', '.join(['d', 'e']) }}"
        "{{ [1, 2] + [3] }}{{ 2 ** 10 }}{{ '{}'.format('f') }}{{ messages | map(attribute='role') | join(',') }}"
    )
    assert ChatTemplate(template, {}).render(MESSAGES) == (
        '<user>Hi---[{"role": "user", "content": "Hi"}]a:7cd, e[1, 2, 3]1024fuser'
    )


def test_a_long_conversation_is_no_attack() -> None:
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    messages = [{"role": "user", "content": "word " * 200}] * 2000
    assert len(ChatTemplate(template, {}).render(messages)) == 2000 * (7 + 1000)
