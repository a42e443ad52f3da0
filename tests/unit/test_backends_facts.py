"""What `--backend deepspeed` reads from a model folder, and which models it refuses before a world starts."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.backends.model_facts import HuggingFaceModel
from engine.models.config import ModelConfig
from engine.models.errors import ModelError
from launcher.errors import SettingsError
from launcher.settings import Settings

TINY = {
    "vocab_size": 384,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "intermediate_size": 160,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


def folder(path: Path, architecture: str, model_type: str, **options: Any) -> Path:
    config = {"architectures": [architecture], "model_type": model_type, **TINY, **options}
    (path / "config.json").write_text(json.dumps(config))
    return path


def refusal(path: Path, architecture: str, model_type: str, **options: Any) -> str:
    with pytest.raises(ModelError) as error:
        HuggingFaceModel.from_folder(folder(path, architecture, model_type, **options))
    text = str(error.value)
    assert "\n" not in text and architecture in text
    return text


def test_facts_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    facts = HuggingFaceModel.from_folder(
        folder(tmp_path, "Starcoder2ForCausalLM", "starcoder2", num_key_value_heads=3, sliding_window=20)
    )
    assert facts == HuggingFaceModel(
        architecture="Starcoder2ForCausalLM", vocab_size=384, num_layers=2, num_heads=6, num_kv_heads=3,
        hidden_size=96, max_model_len=512, eos_token_ids=(5, 2), window=20,
    )  # fmt: skip


def test_keys_that_an_architecture_calls_otherwise(tmp_path: Path) -> None:
    options = {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 128, "vocab_size": 384}
    config = {"architectures": ["GPTBigCodeForCausalLM"], "model_type": "gpt_bigcode", **options}
    (tmp_path / "config.json").write_text(json.dumps(config))
    facts = HuggingFaceModel.from_folder(tmp_path)
    assert (facts.hidden_size, facts.num_heads, facts.num_layers, facts.max_model_len) == (64, 4, 3, 128)


@pytest.mark.parametrize(
    ("architecture", "model_type", "options", "reason"),
    [
        ("BloomForCausalLM", "bloom", {}, "attention interface"),
        ("FalconForCausalLM", "falcon", {"alibi": True}, "ALiBi"),
        ("FalconForCausalLM", "falcon", {}, "attention interface"),
        ("MambaForCausalLM", "mamba", {}, "linear_attention"),
        ("Qwen3NextForCausalLM", "qwen3_next", {}, "linear_attention"),
        ("T5ForConditionalGeneration", "t5", {}, "generate text from text alone"),
        ("BartForCausalLM", "bart", {"is_encoder_decoder": True}, "encoder"),
        ("Gemma3ForConditionalGeneration", "gemma3", {}, "images|generate text from text alone"),
        ("LlamaForCausalLM", "llama", {"quantization_config": {"quant_method": "gptq"}}, "unquantized"),
        ("MadeUpForCausalLM", "llama", {}, "not one of transformers' models"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(
    tmp_path: Path, architecture: str, model_type: str, options: dict[str, Any], reason: str
) -> None:
    assert re.search(reason, refusal(tmp_path, architecture, model_type, **options))


def test_code_in_a_model_folder_is_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(ran)!r}, 'w')")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    with pytest.raises(ModelError):
        HuggingFaceModel.from_folder(folder(tmp_path, "EvilForCausalLM", "evil", auto_map=auto_map))
    assert not ran.exists()


@pytest.mark.parametrize(("tp", "pp", "flag"), [(1, 2, "--pp 2"), (4, 1, "--tp 4"), (0, 1, "--tp 0")])
def test_shapes_that_cannot_be(tmp_path: Path, tp: int, pp: int, flag: str) -> None:
    facts = HuggingFaceModel.from_folder(
        folder(tmp_path, "Starcoder2ForCausalLM", "starcoder2", num_key_value_heads=3)
    )
    facts.check_shape(3, 1)
    with pytest.raises(ModelError, match=flag):
        facts.check_shape(tp, pp)


def test_without_the_packages_the_refusal_says_how_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "deepspeed" else find(name, *rest)
    )
    with pytest.raises(ModelError, match=r"needs deepspeed.*pip install 'phalanx-serve\[deepspeed\]'"):
        HuggingFaceModel.from_folder(folder(tmp_path, "GPTNeoXForCausalLM", "gpt_neox"))


def test_auto_says_that_the_backend_may_run_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"GPTNeoXForCausalLM is not supported.*--backend deepspeed"):
        ModelConfig.from_folder(folder(tmp_path, "GPTNeoXForCausalLM", "gpt_neox"))
    with pytest.raises(ModelError) as error:
        ModelConfig.from_folder(folder(tmp_path, "Gemma3ForConditionalGeneration", "gemma3"))
    assert "--backend" not in str(error.value)


def test_settings() -> None:
    assert Settings("m").backend == "auto"
    assert Settings("m", backend="deepspeed", tp=2).backend == "deepspeed"
    with pytest.raises(SettingsError, match="--pp 2: --backend deepspeed has no pipeline"):
        Settings("m", backend="deepspeed", pp=2)
    with pytest.raises(SettingsError, match="--backend vllm: must be one of auto, phalanx, deepspeed"):
        Settings("m", backend="vllm")
