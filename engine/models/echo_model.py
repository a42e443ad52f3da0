"""The diagnostic model `echo`: a tokenizer of bytes and no weights. Its world repeats the prompt.

Called by `prepare`, which writes its folder, and by `engine.rank`, which asks whether a folder is one. Imports
nothing slow unless the folder has to be written.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

NAME = "echo"
MODEL_TYPE = "phalanx_echo"
MAX_MODEL_LEN = 8192
KV_CACHE_TOKENS = 1 << 24
"""It has no cache: a number that no request meets."""
FORMAT = 1
"""Of the folder's content; raised when that changes."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_TOKEN_ID = 2
"""`<|im_end|>`: so the echo of a conversation ends with its first message."""
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)


def is_echo(folder: Path) -> bool:
    """Whether a model folder is that of the echo model."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def echo_folder(cache: Path) -> Path:
    """The folder of the model in the model cache, written if it is not there."""
    folder = cache / "models" / f"{NAME}-{FORMAT}"
    if not is_echo(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{NAME}-", dir=folder.parent))
        _write(aside)
        try:
            aside.rename(folder)
        except OSError:  # somebody else was faster
            shutil.rmtree(aside)
    return folder


def _write(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIAL_TOKENS, *alphabet]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    of_tokenizer = {"bos_token": SPECIAL_TOKENS[1], "eos_token": SPECIAL_TOKENS[END_TOKEN_ID]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**of_tokenizer, "chat_template": _CHAT_TEMPLATE})
    )
    config = {"model_type": MODEL_TYPE, "max_position_embeddings": MAX_MODEL_LEN, "vocab_size": VOCAB_SIZE}
    (folder / "config.json").write_text(json.dumps(config))
