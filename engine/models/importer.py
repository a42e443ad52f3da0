"""Turns a GGUF file into a folder in Hugging Face format, once: weights as bfloat16, config, tokenizer.

Called by the catalog. Imports numpy and gguf, never torch. The folder is written aside and renamed when it is
whole, so that nobody ever sees half of it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models.errors import ModelError
from engine.models.locks import locked
from engine.models.safetensors_header import TensorEntry, lay_out

if TYPE_CHECKING:
    from engine.models.gguf_file import GgufFile

IMPORT_VERSION = 1
"""To be raised whenever the same GGUF file is turned into another folder; older ones are made anew."""

_NOTE = "phalanx_import.json"

TensorProgress = Callable[[int, int], None]
"""Is told (tensors done, tensors in all)."""

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"
_ARCHITECTURES = {"llama": ("LlamaForCausalLM", "llama"), "qwen2": ("Qwen2ForCausalLM", "qwen2")}
"""Names in GGUF: `architectures` and `model_type` of config.json."""


def import_gguf(path: Path, folder: Path, source_hash: str, progress: TensorProgress) -> None:
    """Makes `folder` from the GGUF file at `path`, unless an import of the same content is there already.

    `source_hash` identifies the content. Several processes may call this at once: one works, the others wait.
    Raises ModelError for files that are damaged or of a kind that is not supported.
    """
    if is_imported(folder, source_hash):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock"), waiting=lambda: None) as lock:
        if is_imported(folder, source_hash):
            return
        for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(leftover, ignore_errors=True)
        aside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        aside.mkdir()

        def advance(done: int, total: int) -> None:
            lock.beat()
            progress(done, total)

        try:
            _write_folder(path, aside, advance)
            note = {"version": IMPORT_VERSION, "source": path.name, "source_sha256": source_hash}
            (aside / _NOTE).write_text(json.dumps(note))
            for file in [*aside.iterdir(), aside]:
                _sync(file)  # a folder that is seen after a power cut is a whole one
            if folder.exists():
                folder.rename(aside.with_name(f"{aside.name}.old.partial"))
            aside.rename(folder)
            _sync(folder.parent)
        finally:
            for leftover in folder.parent.glob(f".{folder.name}.*.partial"):
                shutil.rmtree(leftover, ignore_errors=True)


def is_imported(folder: Path, source_hash: str) -> bool:
    """Whether `folder` is a whole import of that content, made by this version of the importer."""
    try:
        note = json.loads((folder / _NOTE).read_bytes())
        return bool(note["version"] == IMPORT_VERSION and note["source_sha256"] == source_hash)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_folder(path: Path, folder: Path, progress: TensorProgress) -> None:
    from engine.models.gguf_file import GgufFile
    from engine.models.gguf_tokenizer import write_tokenizer

    progress(0, 0)
    gguf = GgufFile(path)
    config = _config(gguf)
    # The cheap files first: what cannot be imported is refused before the long work.
    write_tokenizer(gguf, folder, config["max_position_embeddings"])
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {
        key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config
    }
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    _write_weights(gguf, config, folder / "model.safetensors", progress)


# --------------------------------------------------------------------------- config.json


def _config(gguf: GgufFile) -> dict[str, Any]:
    import numpy as np

    from engine.models.gguf_tokenizer import special_token_id

    name = gguf.get("general.architecture", str)
    if name not in _ARCHITECTURES:
        allowed = ", ".join(_ARCHITECTURES)
        raise ModelError(
            f"{gguf.path}: architecture {name!r} is not supported; supported in GGUF are {allowed}"
        )
    if gguf.get(f"{name}.expert_count", int, 0):
        raise ModelError(f"{gguf.path}: models with experts are not supported")
    if "token_embd.weight" not in gguf.tensors:
        raise ModelError(f"{gguf.path}: tensor token_embd.weight is missing; the model is not complete")
    architecture, model_type = _ARCHITECTURES[name]
    hidden_size = gguf.get(f"{name}.embedding_length", int)
    num_heads = gguf.get(f"{name}.attention.head_count", int)
    head_dim = gguf.get(f"{name}.attention.key_length", int, hidden_size // num_heads)
    rotated = gguf.get(f"{name}.rope.dimension_count", int, head_dim)
    if rotated != head_dim or gguf.get(f"{name}.attention.value_length", int, head_dim) != head_dim:
        raise ModelError(
            f"{gguf.path}: heads of {head_dim} elements of which {rotated} are rotated are not supported"
        )
    # Stored as float32: its shortest decimal form is the number that was meant, 1e-05 and not 9.99999975e-06.
    epsilon = float(str(np.float32(gguf.get(f"{name}.attention.layer_norm_rms_epsilon", float))))
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": gguf.shape("token_embd.weight")[0],
        "hidden_size": hidden_size,
        "intermediate_size": gguf.get(f"{name}.feed_forward_length", int),
        "num_hidden_layers": gguf.get(f"{name}.block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf.get(f"{name}.attention.head_count_kv", int, num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": epsilon,
        "max_position_embeddings": gguf.get(f"{name}.context_length", int),
        "rope_theta": gguf.get(f"{name}.rope.freq_base", float, 10000.0),
        "rope_scaling": _rope_scaling(gguf, name),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "torch_dtype": "bfloat16",
    }
    if name == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in gguf.tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in gguf.tensors
    for key, token in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        index = special_token_id(gguf, token)
        if index is not None:
            config[f"{key}_token_id"] = index
    if (turn := special_token_id(gguf, "eot")) is not None and turn != config.get("eos_token_id"):
        config["eos_token_id"] = [config["eos_token_id"], turn] if "eos_token_id" in config else turn
    return config


def _rope_scaling(gguf: GgufFile, name: str) -> dict[str, Any] | None:
    kind = gguf.get(f"{name}.rope.scaling.type", str, "none")
    if _ROPE_FACTORS in gguf.tensors:
        return _llama3_scaling(gguf)
    if kind == "none":
        return None
    factor = gguf.get(f"{name}.rope.scaling.factor", float)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = gguf.get(f"{name}.rope.scaling.original_context_length", int)
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise ModelError(f"{gguf.path}: rope scaling {kind!r} is not supported; supported are linear and yarn")


def _llama3_scaling(gguf: GgufFile) -> dict[str, Any]:
    """GGUF keeps what Llama 3's scaling comes to for each frequency; the formula's numbers are found again by
    trying those that Llama 3.1 to 3.3 were published with."""
    import numpy as np

    factors = np.concatenate([part.ravel() for part in gguf.rows(_ROPE_FACTORS)]).astype(np.float64)
    theta = gguf.get("llama.rope.freq_base", float, 10000.0)
    low, high, original, factor = 1.0, 4.0, 8192, float(factors.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    blend = np.clip((original / wavelengths - low) / (high - low), 0.0, 1.0)
    if not np.allclose(factors, 1 / ((1 - blend) / factor + blend), rtol=1e-3):
        raise ModelError(f"{gguf.path}: {_ROPE_FACTORS} holds a rope scaling that is not Llama 3's")
    return {
        "rope_type": "llama3",
        "factor": round(factor, 4),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


# --------------------------------------------------------------------------- model.safetensors


def _write_weights(gguf: GgufFile, config: dict[str, Any], file: Path, progress: TensorProgress) -> None:
    from engine.models.gguf_file import to_bfloat16

    names = {name: _hugging_face_name(gguf, name) for name in gguf.tensors if name != _ROPE_FACTORS}
    layout = lay_out((TensorEntry(names[name], "BF16", gguf.shape(name)) for name in names), {})
    with file.open("wb", buffering=0) as target:
        target.write(layout.header)
        for done, name in enumerate(names):
            progress(done, len(names))
            for rows in _rows(gguf, config, name):
                data = to_bfloat16(rows).reshape(-1).view("uint8").data
                while data:  # one write call takes 2 GiB at most
                    data = data[target.write(data) :]
        progress(len(names), len(names))


def _hugging_face_name(gguf: GgufFile, name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in _TENSOR_NAMES:
        raise ModelError(
            f"{gguf.path}: tensor {name} is unknown; the model is not of a kind that is supported"
        )
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{_TENSOR_NAMES[match[2]]}.{match[3]}"


def _rows(gguf: GgufFile, config: dict[str, Any], name: str) -> Iterator[Any]:
    """The tensor's rows in the order of Hugging Face.

    llama.cpp rotates neighbouring elements of a head (2i, 2i + 1) in the llama architecture, Hugging Face
    elements half a head apart (i, i + head_dim / 2): its converter reorders the rows of q and k, and that is
    undone here (`LlamaModel.permute` in convert_hf_to_gguf.py).
    """
    import numpy as np

    kind = name.split(".")[-2]
    if config["model_type"] != "llama" or kind not in ("attn_q", "attn_k"):
        yield from gguf.rows(name)
        return
    heads = config["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
    order = np.arange(gguf.shape(name)[0]).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
    if name.endswith(".bias"):
        yield np.concatenate([part.ravel() for part in gguf.rows(name)])[order]
    else:
        yield from gguf.rows(name, order)
