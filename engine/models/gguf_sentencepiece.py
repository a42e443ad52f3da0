"""A SentencePiece vocabulary of a GGUF file (`tokenizer.ggml.model` is `llama`) as a tokenizer of the `tokenizers`
library: BPE over characters, in which pieces with higher scores are made first, with bytes for what is unknown.

Called by gguf_tokenizer. SentencePiece: arXiv 1808.06226; its BPE: `bpe_model.cc` there.
"""

from __future__ import annotations

from typing import Any

from engine.models.errors import ModelError
from engine.models.gguf_file import GgufFile
from engine.models.gguf_tokens import TokenType

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What stands for a space in pieces."""

_NUM_BYTES = 256


def sentencepiece_tokenizer(gguf: GgufFile, names: list[str], types: list[int]) -> Any:
    """The tokenizer without its added tokens. Raises ModelError."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = gguf.scores("tokenizer.ggml.scores")
    if len(scores) != len(names) or len(types) != len(names):
        raise ModelError(
            f"{gguf.path}: tokenizer.ggml.scores and token_type have {len(scores)} and {len(types)} entries for "
            f"{len(names)} tokens; the file is damaged"
        )
    vocabulary = {name: index for index, name in enumerate(names)}
    if len(vocabulary) != len(names):
        raise ModelError(f"{gguf.path}: tokenizer.ggml.tokens holds a token twice")
    unknown = next((name for name, kind in zip(names, types, strict=True) if kind == TokenType.UNKNOWN), None)
    if unknown is None:
        index = gguf.get("tokenizer.ggml.unknown_token_id", int, 0)
        unknown = names[index] if index < len(names) else None
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(names, types, scores, takes_space_prefix(gguf)),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=sum(kind == TokenType.BYTE for kind in types) == _NUM_BYTES,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    prefixed = takes_space_prefix(gguf)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefixed else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    return tokenizer


def takes_space_prefix(gguf: GgufFile) -> bool:
    """Whether a text is taken as if it began with a space."""
    return bool(gguf.get("tokenizer.ggml.add_space_prefix", bool, True))


def piece_names(gguf: GgufFile, names: list[str], types: list[int]) -> list[str]:
    """The names as SentencePiece has them: llama.cpp's converter writes runs of spaces that are tokens of the user's
    with plain spaces."""
    if takes_space_prefix(gguf):
        return names
    taken = set(names)
    return [
        name.replace(" ", SPACE)
        if kind == TokenType.USER_DEFINED and name.replace(" ", SPACE) not in taken
        else name
        for name, kind in zip(names, types, strict=False)
    ]


def is_matched_normalized(gguf: GgufFile, name: str) -> bool:
    """Whether a token of the user's has to be looked for where spaces are pieces' own already."""
    return SPACE in name and not takes_space_prefix(gguf)


def _merges(names: list[str], types: list[int], scores: list[float], prefixed: bool) -> list[tuple[str, str]]:
    """Every way to make a piece of two, those of higher scores first; of one piece, in the order of its parts."""
    kinds = {TokenType.NORMAL}
    if prefixed:
        # Those that cannot be looked for as a whole, see is_matched_normalized.
        kinds.add(TokenType.USER_DEFINED)
    usable = {
        name: index
        for index, (name, kind) in enumerate(zip(names, types, strict=True))
        if kind == TokenType.NORMAL or (kind in kinds and SPACE in name)
    }
    ranked = []
    for name, index in usable.items():
        for cut in range(1, len(name)):
            left, right = usable.get(name[:cut]), usable.get(name[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[index], index, left, right))
    ranked.sort()
    return [(names[left], names[right]) for _score, _index, left, right in ranked]
