"""A model's text side: files, special tokens, chat templates as transformers renders them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.chat_template import ChatTemplate, ChatTemplateError
from gateway.errors import ModelFilesError
from gateway.text import TextModel, TextTooLong
from tests.echo_world import write_text_folder

TEMPLATES = {
    "plain": "{% for m in messages %}{{ m['role'] }}: {{ m.content }}\n{% endfor %}",
    "trimmed": (
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'system' %}\n{{ bos_token }}[{{ message.content | trim }}]\n"
        "    {% else %}\n  {{ message.content | upper }}{{ eos_token }}\n    {% endif %}\n"
        "{%- endfor %}\n{% if add_generation_prompt %}>>>{% endif %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
    ),
    "json": "{{ messages | tojson(indent=2) }}{{ {'a': '<&>', 'b': 'é'} | tojson }}",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    ),
    "generation": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{% if tools %}tools{% endif %}{% if documents is defined and documents %}docs{% endif %}"
    ),
    "date": "{{ strftime_now('%Y') }}",
}

CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": " be kind "},
    {"role": "user", "content": 'say "héllo" <b>\n'},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "again"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_text_folder(tmp_path)


def change_config(folder: Path, **entries: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template(
        conversations=[CONVERSATION],
        chat_template=TEMPLATES[name],
        add_generation_prompt=True,
        **special,
    )
    assert ChatTemplate(TEMPLATES[name], special).render(CONVERSATION) == expected[0]


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        template.render(CONVERSATION)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].clear() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source, {}).render(CONVERSATION)


def test_a_broken_template_names_the_problem() -> None:
    with pytest.raises(ModelFilesError, match="does not compile"):
        ChatTemplate("{% for m in messages %}", {})


def test_a_conversation_is_encoded_with_the_template_s_special_tokens(folder: Path) -> None:
    text = TextModel.from_folder(folder)
    token_ids = text.encode_chat([{"role": "user", "content": "hello"}])
    assert token_ids[0] == 1 and token_ids.count(2) == 1
    assert text.decode(token_ids) == "user\nhello\nassistant\n"


def test_templates_read_the_variables_of_a_request_but_not_in_place_of_their_own(folder: Path) -> None:
    source = "{{ enable_thinking }} {{ messages[0].content }} {{ bos_token }}"
    source += "{% if add_generation_prompt %} go{% endif %}"
    (folder / "chat_template.jinja").write_text(source)
    text = TextModel.from_folder(folder)
    messages = [{"role": "user", "content": "hi"}]
    variables = {"enable_thinking": 7, "messages": [], "bos_token": "x", "add_generation_prompt": True}
    ids = text.encode_chat(messages, add_generation_prompt=False, variables=variables)
    assert ids == text.encode("7 hi <|im_start|>", add_special_tokens=False)
    assert text.encode_chat(messages) == text.encode(" hi <|im_start|> go", add_special_tokens=False)


def test_the_template_file_wins_over_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from the file {{ bos_token }}")
    template = TextModel.from_folder(folder).chat_template
    assert template is not None and template.render([]) == "from the file <|im_start|>"


def test_named_templates_and_token_objects(folder: Path) -> None:
    change_config(
        folder,
        bos_token={"content": "<|endoftext|>", "lstrip": False},
        chat_template=[
            {"name": "tool_use", "template": "no"},
            {"name": "default", "template": "yes {{ bos_token }}"},
        ],
    )
    template = TextModel.from_folder(folder).chat_template
    assert template is not None and template.render([]) == "yes <|endoftext|>"


def test_a_model_without_a_template_says_what_to_use(folder: Path) -> None:
    change_config(folder, chat_template=None)
    with pytest.raises(ModelFilesError, match="/v1/completions"):
        TextModel.from_folder(folder).encode_chat(CONVERSATION)


def test_missing_and_broken_files_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json is missing"):
        TextModel.from_folder(tmp_path / "nowhere")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelFilesError, match=r"tokenizer_config\.json cannot be read"):
        TextModel.from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelFilesError, match=r"tokenizer\.json cannot be read"):
        TextModel.from_folder(folder)


def test_text_that_is_no_unicode_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="surrogate"):
        TextModel.from_folder(folder).encode("a\ud800b")


def test_a_text_that_is_certainly_too_long_is_not_encoded(folder: Path) -> None:
    text = TextModel.from_folder(folder)
    longest = len("<|endoftext|>")
    assert len(text.encode("z" * longest * 1000, at_most=1000)) == longest * 1000  # may be: it is looked at
    with pytest.raises(TextTooLong, match="13001 characters, which are more than 1000 tokens"):
        text.encode("z" * (longest * 1000 + 1), at_most=1000)
    with pytest.raises(TextTooLong):
        text.encode_chat([{"role": "user", "content": "z" * 100_000}], at_most=1000)
