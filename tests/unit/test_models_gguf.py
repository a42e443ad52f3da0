"""GGUF files, written here as llama.cpp's converter writes them, become the folders that they came from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engine.models.config import ModelConfig
from engine.models.errors import ModelError
from engine.models.gguf_file import to_bfloat16
from engine.models.importer import import_gguf
from engine.models.source_files import SourceFiles
from tests.tiny_models import make_tiny_llama

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>"]
TEXT = "the phalanx moves as one and when a man falls the one behind him steps forward in the year 331 " * 4


def trained_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE tokenizer with the pre-tokenizer that GGUF calls "smollm"."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    parts = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return parts.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    folder: Path,
    file: Path,
    *,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: dict[str, Any] | None = None,
    leave_out: tuple[str, ...] = (),
    more_tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """The model of `folder` as llama.cpp would convert it. `metadata` replaces keys; None takes one away."""
    config = json.loads((folder / "config.json").read_text())
    vocabulary = trained_tokenizer(config["vocab_size"])
    tokens = sorted(vocabulary.get_vocab(), key=vocabulary.get_vocab().__getitem__)
    tokens += [f"<unused {index}>" for index in range(len(tokens), config["vocab_size"])]
    merges = [" ".join(pair) for pair in json.loads(vocabulary.to_str())["model"]["merges"]]
    values: dict[str, Any] = {
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": config["num_attention_heads"],
        f"{architecture}.attention.head_count_kv": config["num_key_value_heads"],
        f"{architecture}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{architecture}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, 4] + [1] * (len(tokens) - 4),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages[0].content }}",
        **(metadata or {}),
    }
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in values.items():
        if value is None or key in leave_out:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        base, _, suffix = name.rpartition(".")
        layer = ""
        if base.startswith("model.layers."):
            number, base = base.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{number}."
        if f"{layer}{NAMES[base]}.{suffix}" in leave_out:
            continue
        data = tensor.float().numpy()
        if architecture == "llama" and NAMES[base] in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if NAMES[base] == "attn_q" else "num_key_value_heads"]
            data = permute(data, heads)
        if data.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{layer}{NAMES[base]}.{suffix}", data)
        else:
            writer.add_tensor(
                f"{layer}{NAMES[base]}.{suffix}", gguf.quants.quantize(data, kind), raw_dtype=kind
            )
    for name, data in (more_tensors or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def tiny(folder: Path, **options: Any) -> Path:
    return make_tiny_llama(
        folder, num_layers=2, num_heads=4, num_kv_heads=2, hidden=64, vocab=420, dtype="bfloat16", **options
    )


def imported(file: Path, target: Path) -> Path:
    import_gguf(file, target, "hash", lambda done, total: None)
    return target


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    ("hugging_face", "architecture", "bias"),
    [
        ("LlamaForCausalLM", "llama", False),
        ("LlamaForCausalLM", "llama", True),
        ("Qwen2ForCausalLM", "qwen2", False),
    ],
)
def test_the_way_there_and_back(
    tmp_path: Path, hugging_face: str, architecture: str, bias: bool, tie: bool
) -> None:
    folder = tiny(tmp_path / "model", architecture=hugging_face, tie=tie, attention_bias=bias, mlp_bias=bias)
    file = write_gguf(folder, tmp_path / "model.gguf", architecture=architecture)
    result = imported(file, tmp_path / "imported")
    before, after = load_file(folder / "model.safetensors"), load_file(result / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    config = ModelConfig.from_folder(result)
    assert config == ModelConfig.from_folder(folder)
    SourceFiles(result).check(config)


def test_quantized_weights_are_dequantized_then_reordered(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    kind = gguf.GGMLQuantizationType.Q8_0
    result = imported(write_gguf(folder, tmp_path / "model.gguf", kind=kind), tmp_path / "imported")
    before, after = load_file(folder / "model.safetensors"), load_file(result / "model.safetensors")
    for name, tensor in before.items():
        error = (after[name].float() - tensor.float()).abs().max() / tensor.float().abs().max()
        assert error < 0.01, name


def test_the_tokenizer(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    original = trained_tokenizer(420)
    original.add_special_tokens(SPECIAL[:3])
    result = imported(write_gguf(folder, tmp_path / "model.gguf"), tmp_path / "imported")
    tokenizer = Tokenizer.from_file(str(result / "tokenizer.json"))
    for text in (TEXT, "a  12", "<|im_start|>user\nhé 你好 🙂<|im_end|>", "331<tool>"):
        assert tokenizer.encode(text).ids == original.encode(text).ids
    assert tokenizer.decode([1, 100, 2]) == tokenizer.decode([100]), "control tokens are special"
    assert tokenizer.decode([3]) == "<tool>", "user-defined tokens are text"
    settings = json.loads((result / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")
    assert settings["chat_template"] == "{{ messages[0].content }}"
    assert json.loads((result / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "in 1234", ["in", " 1234"]),
        ("smollm", "in 1234", ["in", " ", "1", "2", "3", "4"]),
        ("llama-bpe", "in 1234", ["in", " ", "123", "4"]),
        ("qwen2", "in 1234", ["in", " ", "1", "2", "3", "4"]),
    ],
)
def test_pre_tokenizers(tmp_path: Path, pre: str, text: str, pieces: list[str]) -> None:
    folder = tiny(tmp_path / "model")
    file = write_gguf(folder, tmp_path / "model.gguf", metadata={"tokenizer.ggml.pre": pre})
    tokenizer = Tokenizer.from_file(str(imported(file, tmp_path / "imported") / "tokenizer.json"))
    found = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert found == pieces


@pytest.mark.parametrize(
    ("pre", "add", "first"),
    [("llama-bpe", None, [1]), ("llama-bpe", False, []), ("gpt-2", None, []), ("gpt-2", True, [1])],
)
def test_the_bos_token(tmp_path: Path, pre: str, add: bool | None, first: list[int]) -> None:
    folder = tiny(tmp_path / "model")
    metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": add}
    file = write_gguf(folder, tmp_path / "model.gguf", metadata=metadata)
    tokenizer = Tokenizer.from_file(str(imported(file, tmp_path / "imported") / "tokenizer.json"))
    plain = tokenizer.encode("the", add_special_tokens=False).ids
    assert tokenizer.encode("the").ids == first + plain


def test_rope_scalings(tmp_path: Path) -> None:
    folder = tiny(tmp_path / "model")
    for kind, more in (("linear", {}), ("yarn", {"llama.rope.scaling.original_context_length": 128})):
        metadata = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 4.0, **more}
        file = write_gguf(folder, tmp_path / f"{kind}.gguf", metadata=metadata)
        rope = ModelConfig.from_folder(imported(file, tmp_path / kind)).rope
        assert (rope.scaling, rope.factor) == (kind, 4.0)


def test_the_scaling_of_llama_3_is_found_again(tmp_path: Path) -> None:
    """Factors as convert_hf_to_gguf.py computes them, for Llama 3.2's numbers."""
    folder = tiny(tmp_path / "model")
    head_dim, theta, factor, low, high, original = 16, 500000.0, 32.0, 1.0, 4.0, 8192
    factors = []
    for frequency in 1.0 / theta ** (np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * np.pi / frequency
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    file = write_gguf(
        folder,
        tmp_path / "model.gguf",
        metadata={"llama.rope.freq_base": theta},
        more_tensors={"rope_freqs.weight": np.array(factors, dtype=np.float32)},
    )
    rope = ModelConfig.from_folder(imported(file, tmp_path / "imported")).rope
    assert rope.scaling == "llama3"
    assert (rope.factor, rope.low_freq_factor, rope.high_freq_factor) == (32.0, 1.0, 4.0)
    assert rope.original_max_position == 8192


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"architecture": "gptneox"}, ["gptneox", "llama", "qwen2"]),
        ({"metadata": {"tokenizer.ggml.model": "t5"}}, ["t5", "SentencePiece", "Hugging Face folder"]),
        ({"metadata": {"tokenizer.ggml.pre": "viking"}}, ["viking", "smollm"]),
        ({"metadata": {"llama.expert_count": 8}}, ["llama.expert_used_count"]),
        ({"metadata": {"llama.block_count": None}}, ["llama.block_count", "missing"]),
        ({"metadata": {"llama.block_count": "two"}}, ["llama.block_count", "two"]),
        ({"metadata": {"llama.rope.dimension_count": 8}}, ["16 elements", "8"]),
        ({"metadata": {"tokenizer.ggml.eos_token_id": 70000}}, ["eos", "70000"]),
        ({"metadata": {"split.count": 3}}, ["one part of several"]),
        (
            {"metadata": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}},
            ["longrope"],
        ),
        ({"leave_out": ("token_embd.weight",)}, ["token_embd.weight"]),
        ({"more_tensors": {"blk.0.ffn_gate_exps.weight": np.ones((2, 2), np.float32)}}, ["ffn_gate_exps"]),
        ({"more_tensors": {"rope_freqs.weight": np.full(8, 3.0, np.float32)}}, ["rope_freqs.weight"]),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], words: list[str]) -> None:
    file = write_gguf(tiny(tmp_path / "model"), tmp_path / "model.gguf", **options)
    with pytest.raises(ModelError) as error:
        imported(file, tmp_path / "target" / "imported")
    for word in [*words, str(file)]:
        assert word in str(error.value)
    assert [path.name for path in (tmp_path / "target").iterdir()] == [".imported.lock"]


@pytest.mark.parametrize("keep", [0, 3, 4, 20, 3000, 20000, -1])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    file = write_gguf(tiny(tmp_path / "model"), tmp_path / "model.gguf")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ModelError, match=r"model\.gguf .*fetch the model again"):
        imported(file, tmp_path / "target" / "imported")
    assert [path.name for path in (tmp_path / "target").iterdir()] == [".imported.lock"]


# --------------------------------------------------------------------------- whole or not at all


def test_an_import_happens_once_and_again_when_the_content_changes(tmp_path: Path) -> None:
    file = write_gguf(tiny(tmp_path / "model"), tmp_path / "model.gguf")
    target = imported(file, tmp_path / "imported")
    first = (target / "model.safetensors").stat().st_ino
    imported(file, target)
    assert (target / "model.safetensors").stat().st_ino == first
    import_gguf(file, target, "another hash", lambda done, total: None)
    assert (target / "model.safetensors").stat().st_ino != first
    assert sorted(path.name for path in tmp_path.iterdir() if "imported" in path.name) == [
        ".imported.lock",
        "imported",
    ]


def test_a_killed_import_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    file = write_gguf(tiny(tmp_path / "model"), tmp_path / "model.gguf")
    target = tmp_path / "target" / "imported"
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom engine.models.importer import import_gguf\n"
        "die = lambda done, total: os.kill(os.getpid(), 9) if done == 5 else None\n"
        "import_gguf(Path(sys.argv[1]), Path(sys.argv[2]), 'hash', die)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, file, target], timeout=60)
    assert done.returncode == -9
    assert not target.exists()
    assert list(target.parent.glob("*.partial"))
    imported(file, target)
    assert sorted(path.name for path in target.parent.iterdir()) == [".imported.lock", "imported"]


def test_imports_at_once(tmp_path: Path) -> None:
    file = write_gguf(tiny(tmp_path / "model"), tmp_path / "model.gguf")
    target = tmp_path / "imported"
    code = (
        "import sys\nfrom pathlib import Path\nfrom engine.models.importer import import_gguf\n"
        "told = []\n"
        "import_gguf(Path(sys.argv[1]), Path(sys.argv[2]), 'hash', lambda *step: told.append(step))\n"
        "print(len(told) > 0)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(file), str(target)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for _ in range(3)
    ]
    worked = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(worked) == ["False\n", "False\n", "True\n"], "one works, the others wait for it"


def test_bfloat16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    special = np.array(
        [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F7FFFFF, 0x3F808000]
    )
    values = np.concatenate([bits, special.astype(np.uint32)]).view(np.float32)
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    found = torch.from_numpy(to_bfloat16(values).view(np.int16)).view(torch.bfloat16)
    finite = ~torch.isnan(expected)
    assert torch.equal(found[finite].view(torch.int16), expected[finite].view(torch.int16))
    assert torch.isnan(found[~finite]).all()
