"""Text from tokens, one at a time: together it is what decoding at once gives, and what is out stays."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from gateway.detokenizer import (
    ByteLevelDetokenizer,
    ByteTable,
    Detokenizer,
    StopStrings,
    TextStream,
    WindowDetokenizer,
    special_token_ids,
)
from tests.echo_world import write_text_folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = write_text_folder(tmp_path_factory.mktemp("model"))
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral have it: a space is written as a low line, unknown characters as bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", *"abcdeht", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]  # type: ignore[no-untyped-call]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def detokenizers(tokenizer: Tokenizer) -> list[Detokenizer]:
    return [
        ByteLevelDetokenizer(ByteTable(tokenizer)),
        WindowDetokenizer(tokenizer, special_token_ids(tokenizer)),
    ]


def pieces_of(detokenizer: Detokenizer, token_ids: list[int]) -> list[str]:
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.finish()]


@settings(deadline=None)
@given(text=st.text(max_size=60))
def test_a_text_comes_back(byte_level: Tokenizer, text: str) -> None:
    for detokenizer in detokenizers(byte_level):
        pieces = pieces_of(detokenizer, byte_level.encode(text).ids)
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in text


@settings(deadline=None)
@given(token_ids=st.lists(st.integers(0, 270), max_size=40))
def test_any_tokens_give_what_decoding_at_once_gives(byte_level: Tokenizer, token_ids: list[int]) -> None:
    detokenizer = ByteLevelDetokenizer(ByteTable(byte_level))
    assert "".join(pieces_of(detokenizer, token_ids)) == byte_level.decode(token_ids)


def test_an_incomplete_character_is_held_back(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("a😀b").ids
    assert len(token_ids) == 6
    for detokenizer in detokenizers(byte_level):
        assert pieces_of(detokenizer, token_ids) == ["a", "", "", "", "😀", "b", ""]
    for detokenizer in detokenizers(byte_level):
        assert pieces_of(detokenizer, token_ids[:3])[-1] == "\ufffd"


def test_special_tokens_have_no_text(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("<|im_start|>hi<|im_end|>").ids
    assert len(token_ids) == 4
    for detokenizer in detokenizers(byte_level):
        assert "".join(pieces_of(detokenizer, token_ids)) == "hi"


@settings(deadline=None)
@given(text=st.text(alphabet="abcdeht é😀\n", max_size=40))
def test_byte_fallback_text_comes_back(byte_fallback: Tokenizer, text: str) -> None:
    detokenizer = WindowDetokenizer(byte_fallback, special_token_ids(byte_fallback))
    token_ids = byte_fallback.encode(text).ids
    assert "".join(pieces_of(detokenizer, token_ids)) == byte_fallback.decode(token_ids) == text


@settings(deadline=None)
@given(
    prompt=st.text(alphabet="abcdeht é😀\n", max_size=40), text=st.text(alphabet="abcdeht é😀", max_size=20)
)
def test_a_text_goes_on_behind_its_prompt(byte_fallback: Tokenizer, prompt: str, text: str) -> None:
    """The space before the first word of an output is the output's; only a text's own first one is dropped."""
    before, after = byte_fallback.encode(prompt).ids, byte_fallback.encode(text).ids
    detokenizer = WindowDetokenizer(byte_fallback, special_token_ids(byte_fallback), before)
    together = byte_fallback.decode([*before, *after])
    assert prompt + "".join(pieces_of(detokenizer, after)) == together


def test_a_prompt_that_ends_in_half_a_character_is_no_context(byte_fallback: Tokenizer) -> None:
    half = byte_fallback.encode("ab😀").ids[:-2]
    detokenizer = WindowDetokenizer(byte_fallback, special_token_ids(byte_fallback), half)
    assert "".join(pieces_of(detokenizer, byte_fallback.encode("hat").ids)) == "hat"


def test_the_window_does_not_grow_over_bytes_that_make_no_character(byte_fallback: Tokenizer) -> None:
    lonely = byte_fallback.token_to_id("<0xE2>")
    detokenizer = WindowDetokenizer(byte_fallback, special_token_ids(byte_fallback))
    emitted = "".join(detokenizer.push(lonely) for _ in range(200))
    assert len(emitted) > 150
    assert len(detokenizer._window) < 30


# --------------------------------------------------------------------------- stop strings


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By the definition, character by character: the match that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        matches = [stop for stop in stops if text[:end].endswith(stop)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


stop_lists = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4)


@settings(deadline=None)
@given(st.lists(st.text(alphabet="abc", max_size=5), max_size=12), stop_lists)
def test_stop_strings_are_found_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    emitted = ""
    expected, matched = cut("".join(pieces), stops)
    for piece in pieces:
        emitted += finder.push(piece)
        assert expected.startswith(emitted)  # never a character of the stop string
    emitted += finder.finish()
    assert (emitted, finder.matched) == (expected, matched)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    finder = StopStrings(["STOP"])
    assert finder.push("one S") == "one "
    assert finder.push("TO") == ""
    assert finder.push("NE") == "STONE"
    assert finder.push(" ST") == " "
    assert finder.finish() == "ST"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings(["a", ""])


def test_a_stop_string_across_token_borders(byte_level: Tokenizer) -> None:
    stream = TextStream(ByteLevelDetokenizer(ByteTable(byte_level)), ["lo w"])
    pieces = [stream.push(token_id) for token_id in byte_level.encode("say hello world").ids]
    assert "".join(pieces) + stream.finish() == "say hel"
    assert stream.matched_stop == "lo w"


def test_a_stop_string_may_be_found_at_the_very_end(byte_level: Tokenizer) -> None:
    token_ids = byte_level.encode("ab😀").ids[:-1]
    stream = TextStream(ByteLevelDetokenizer(ByteTable(byte_level)), ["\ufffd"])
    text = "".join(stream.push(token_id) for token_id in token_ids) + stream.finish()
    assert (text, stream.matched_stop) == ("ab", "\ufffd")
