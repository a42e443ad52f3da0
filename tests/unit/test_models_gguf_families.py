"""Models of every family, written here as llama.cpp's converter writes them, come back as what they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.models.config import ModelConfig
from engine.models.errors import ModelError
from engine.models.gguf_families import family_of, model_config
from engine.models.gguf_file import GgufFile
from engine.models.importer import import_gguf
from tests.gguf_models import write_family
from tests.tiny_models import make_tiny_family

HEAD_SCALE = {"query_pre_attn_scalar": 16}
"""Of the models that llama.cpp does not know by their number of layers: the size of a head."""

FAMILIES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "llama", {}, {}),
    "mixtral": ("mixtral", "llama", {}, {}),
    "qwen2": ("qwen2", "qwen2", {"use_sliding_window": False}, {}),
    "qwen3": ("qwen3", "qwen3", {}, {}),
    "qwen3-without-bias": ("qwen3", "qwen3", {"attention_bias": False, "tie_word_embeddings": True}, {}),
    "qwen3-moe": ("qwen3-moe", "qwen3moe", {}, {}),
    "gemma2": ("gemma2", "gemma2", HEAD_SCALE, {}),
    # Seven layers, so that the one in six without a window is among them.
    "gemma3": ("gemma3", "gemma3", {**HEAD_SCALE, "sliding_window_pattern": 6, "num_hidden_layers": 7}, {}),
    "gemma3-every-third": (
        "gemma3",
        "gemma3",
        HEAD_SCALE,
        {"gemma3.attention.sliding_window_pattern": [True, True, False, True]},
    ),
    "gemma3-by-number": (
        "gemma3",
        "gemma3",
        {**HEAD_SCALE, "sliding_window_pattern": 2},
        {"gemma3.attention.sliding_window_pattern": 2},
    ),
    "phi3": ("phi3", "phi3", {}, {}),
    "phi3-longrope": ("phi3-longrope", "phi3", {}, {"phi3.rope.scaling.type": "longrope"}),
    "granite": ("granite", "granite", {}, {}),
    "olmo2": ("olmo2", "olmo2", {}, {}),
    "smollm3": ("smollm3", "smollm3", {"no_rope_layers": [1, 1, 1, 0]}, {}),
}
"""Tiny family, architecture in GGUF, what its config has otherwise, and metadata beyond what the converter writes."""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny operations on a machine that runs other tests too: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def imported(file: Path, target: Path) -> Path:
    import_gguf(file, target, "hash", lambda done, total: None)
    return target


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokens = torch.from_numpy(np.random.default_rng(1).integers(3, 384, (1, 50)))
    with torch.inference_mode():
        found: torch.Tensor = model(tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_way_there_and_back(tmp_path: Path, name: str) -> None:
    family, architecture, changes, metadata = FAMILIES[name]
    folder = make_tiny_family(tmp_path / "model", family, dtype="bfloat16", **changes)
    file = write_family(folder, tmp_path / "model.gguf", architecture, metadata=metadata)
    result = imported(file, tmp_path / "imported")
    before, after = load_file(folder / "model.safetensors"), load_file(result / "model.safetensors")
    assert set(before) == set(after)
    for tensor, values in before.items():
        assert torch.equal(after[tensor], values), tensor
    # What the world tests compute with; a scale of 1 / sqrt(16) may be said in two ways.
    ours, original = ModelConfig.from_folder(result), ModelConfig.from_folder(folder)
    assert (ours.attention_scale or 0.25) == pytest.approx(original.attention_scale or 0.25)
    assert replace(ours, attention_scale=None) == replace(original, attention_scale=None)
    # transformers makes the same of the folder as of the original.
    assert (logits(result) - logits(folder)).abs().max() < 1e-3


def read_config(tmp_path: Path, architecture: str, **metadata: Any) -> dict[str, Any]:
    """The config of a file that has no weights but an embedding."""
    keys = {
        "block_count": 4,
        "context_length": 512,
        "embedding_length": 64,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
    }
    import gguf

    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in {**keys, **metadata}.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        (writer.add_string if isinstance(value, str) else add)(f"{architecture}.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((100, 64), np.float32))
    for part in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        part()
    writer.close()
    found = GgufFile(file)
    return model_config(found, *family_of(found))


@pytest.mark.parametrize(("architecture", "layers"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_is_known_by_its_layers(tmp_path: Path, architecture: str, layers: int) -> None:
    """Its scale comes from the hidden size: in 27B 4608 / 32 = 144 and 5376 / 32 = 168."""
    sizes = {"embedding_length": 4608, "attention.head_count": 32, "attention.key_length": 128}
    sizes["attention.value_length"] = 128
    assert read_config(tmp_path, architecture, block_count=layers, **sizes)["query_pre_attn_scalar"] == 144
    assert read_config(tmp_path, architecture, block_count=26, **sizes)["query_pre_attn_scalar"] == 128


def test_gemma_3_stretches_only_the_layers_without_a_window(tmp_path: Path) -> None:
    more = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "attention.sliding_window": 128}
    ropes = read_config(tmp_path, "gemma3", **{"rope.freq_base": 1e6, "rope.freq_base_swa": 5000.0}, **more)
    assert ropes["rope_parameters"] == {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    }


def test_what_files_leave_out_is_what_llama_cpp_takes_for_it(tmp_path: Path) -> None:
    gemma2 = read_config(tmp_path, "gemma2")
    assert (gemma2["sliding_window"], gemma2["attn_logit_softcapping"]) == (4096, 50.0)
    gemma3 = read_config(tmp_path, "gemma3", **{"attention.sliding_window": 512})
    assert gemma3["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000.0
    assert gemma3["layer_types"] == ["sliding_attention"] * 4
    assert read_config(tmp_path, "granite")["attention_multiplier"] == 0.25
    assert read_config(tmp_path, "llama")["rope_theta"] == 10000.0
    assert read_config(tmp_path, "llama", **{"rope.scale_linear": 2.0})["rope_scaling"]["factor"] == 2.0


def test_yarn_with_all_its_numbers(tmp_path: Path) -> None:
    section = "rope.scaling."
    more = {f"{section}type": "yarn", f"{section}factor": 4.0, f"{section}original_context_length": 128}
    more |= {f"{section}yarn_beta_fast": 16.0, f"{section}yarn_attn_factor": 1.25}
    assert read_config(tmp_path, "qwen2", **more)["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 16.0,
        "attention_factor": 1.25,
    }


# --------------------------------------------------------------------------- what is refused


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("qwen3", {"leave_out": ("blk.2.ffn_up.weight",)}, ["tensor blk.2.ffn_up.weight is missing"]),
        (
            "qwen3",
            {"leave_out": ("blk.3.attn_q_norm.weight",)},
            ["tensor blk.3.attn_q_norm.weight is missing"],
        ),
        ("qwen3", {"leave_out": ("blk.1.attn_k.bias",)}, ["tensor blk.1.attn_k.bias is missing"]),
        ("qwen3", {"leave_out": ("output_norm.weight",)}, ["tensor output_norm.weight is missing"]),
        ("phi3", {"leave_out": ("blk.0.attn_qkv.weight",)}, ["tensor blk.0.attn_qkv.weight is missing"]),
        (
            "phi3-longrope",
            {"leave_out": ("rope_factors_long.weight",)},
            ["tensor rope_factors_long.weight is missing"],
        ),
        (
            "mixtral",
            {"leave_out": ("blk.1.ffn_up_exps.weight",)},
            ["tensor blk.1.ffn_up_exps.weight is missing"],
        ),
        (
            "mixtral",
            {"leave_out": ("blk.1.ffn_gate_inp.weight",)},
            ["tensor blk.1.ffn_gate_inp.weight is missing"],
        ),
        (
            "qwen3",
            {"replaced": {"blk.0.ffn_up.weight": ones(112, 32)}},
            ["tensor blk.0.ffn_up.weight has shape [112, 32]", "[112, 64]"],
        ),
        (
            "mixtral",
            {"replaced": {"blk.0.ffn_up_exps.weight": ones(5, 112, 96)}},
            ["tensor blk.0.ffn_up_exps.weight has shape [5, 112, 96]", "6 experts"],
        ),
        (
            "mixtral",
            {"replaced": {"blk.0.ffn_up_exps.weight": ones(6, 96, 112)}},
            ["tensor blk.0.ffn_up_exps.weight has shape [6, 96, 112]", "[112, 96] for each expert"],
        ),
        (
            "qwen2",
            {"replaced": {"blk.0.attn_output.bias": ones(144)}},
            ["tensor blk.0.attn_output.bias is none"],
        ),
        (
            "qwen2",
            {"replaced": {"blk.4.attn_q.weight": ones(144, 144)}},
            ["tensor blk.4.attn_q.weight is none", "4"],
        ),
        (
            "qwen2",
            {"replaced": {"blk.0.attn_sinks.weight": ones(4)}},
            ["tensor blk.0.attn_sinks.weight is unknown"],
        ),
        (
            "qwen2",
            {"replaced": {"blk.0.ffn_up.weight": np.ones((112, 144), np.int8)}},
            ["tensor blk.0.ffn_up.weight is of type I8"],
        ),
        ("qwen2", {"metadata": {"qwen2.attention.head_count": 0}}, ["qwen2.attention.head_count is 0"]),
        (
            "qwen2",
            {"metadata": {"qwen2.attention.head_count_kv": 2}},
            ["model.gguf, as config.json", "multiple"],
        ),
        ("qwen2", {"metadata": {"qwen2.expert_count": 4}}, ["qwen2 with experts", "qwen3moe"]),
        ("olmo2", {"metadata": {"olmo2.attention.sliding_window": 4096}}, ["OLMo 3"]),
        (
            "gemma3",
            {"metadata": {"gemma3.attention.sliding_window_pattern": [True, False]}},
            ["gemma3.attention.sliding_window_pattern"],
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, options: dict[str, Any], words: list[str]) -> None:
    family, architecture, changes, metadata = FAMILIES[name]
    folder = make_tiny_family(tmp_path / "model", family, dtype="bfloat16", **changes)
    options = {**options, "metadata": {**metadata, **options.get("metadata", {})}}
    file = write_family(folder, tmp_path / "model.gguf", architecture, **options)
    with pytest.raises(ModelError) as error:
        imported(file, tmp_path / "target" / "imported")
    for word in [*words, str(file)]:
        assert word in str(error.value)
    assert [path.name for path in (tmp_path / "target").iterdir()] == [".imported.lock"]


def test_damaged_files_are_imported_or_refused(tmp_path: Path) -> None:
    """Whatever the bytes before the weights say: nothing else comes out, and nothing goes on for ever."""
    import gguf

    options = {"use_sliding_window": False, "num_hidden_layers": 1}
    folder = make_tiny_family(tmp_path / "model", "qwen2", dtype="bfloat16", **options)
    whole = write_family(folder, tmp_path / "whole.gguf", "qwen2")
    content, end = whole.read_bytes(), gguf.GGUFReader(whole).data_offset
    chance = random.Random(3)
    damaged = tmp_path / "damaged.gguf"
    outcomes = set()
    for attempt in range(80):
        bytes_of_it = bytearray(content)
        for _ in range(chance.choice([1, 1, 2, 5])):
            at = chance.randrange(4, end)
            bytes_of_it[at] = chance.choice([0, 255, bytes_of_it[at] ^ (1 << chance.randrange(8))])
        damaged.write_bytes(bytes_of_it)
        try:
            import_gguf(damaged, tmp_path / "imported", f"hash {attempt}", lambda done, total: None)
            outcomes.add("imported")
        except ModelError as error:
            assert str(damaged) in str(error)
            outcomes.add("refused")
    assert outcomes == {"imported", "refused"}


@pytest.mark.parametrize(
    ("key", "value"), [("qwen2.attention.head_count", 2**24 + 4), ("qwen2.feed_forward_length", 2**31)]
)
def test_sizes_that_no_model_has(tmp_path: Path, key: str, value: int) -> None:
    with pytest.raises(ModelError, match=rf"{key} is {value}; it has to lie between 1 and"):
        read_config(tmp_path, "qwen2", **{key.removeprefix("qwen2."): value})


def test_a_list_that_claims_to_be_endless(tmp_path: Path) -> None:
    folder = make_tiny_family(
        tmp_path / "model", "qwen2", dtype="bfloat16", use_sliding_window=False, num_hidden_layers=1
    )
    file = write_family(folder, tmp_path / "model.gguf", "qwen2")
    content = file.read_bytes()
    # Behind the key: the type of the value (a list), that of its entries, and their number.
    at = content.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8
    file.write_bytes(content[:at] + (2**40).to_bytes(8, "little") + content[at + 8 :])
    with pytest.raises(ModelError, match=r"model\.gguf is truncated or damaged"):
        GgufFile(file)
