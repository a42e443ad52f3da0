"""Architectures that our decoder does not have, cut by DeepSpeed, against transformers: on this shape of world."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

from engine.backends import loading
from engine.collectives.base import TensorGroup
from engine.engine import Engine
from engine.models.errors import ModelError
from engine.plan import Pooling, PoolingKind
from engine.world import World
from tests import other_architectures
from tests.family_references import NUM_TOKENS, FamilyReference
from tests.other_architectures import ARCHITECTURES
from tests.world import driver

pytestmark = pytest.mark.mpi


@pytest.fixture(scope="module")
def references() -> dict[str, FamilyReference]:
    return other_architectures.load()


def _build(world: World, reference: FamilyReference, **settings: object) -> Engine:
    # The first prompt comes in three chunks, the later ones beside the second prompt's decode rows.
    every = {
        "dtype": "float32", "max_num_seqs": 4, "max_num_batched_tokens": 32, "kv_cache_bytes": 2**20, **settings
    }  # fmt: skip
    return driver.build(world, reference.folder, backend="deepspeed", **every)


def _check_logits(run: driver.Run, reference: FamilyReference, from_token: int = 0) -> None:
    for row, prompt in enumerate(reference.prompts):
        for index in range(from_token, NUM_TOKENS):
            error = np.abs(run.logits[row, len(prompt) + index] - reference.logits[row, index]).max()
            assert error < 1e-3, f"prompt {row}, token {index}: logits differ by {error}"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_and_logits(world: World, references: dict[str, FamilyReference], name: str) -> None:
    reference = references[name]
    requests = [driver.request(row, prompt, NUM_TOKENS) for row, prompt in enumerate(reference.prompts)]
    run = driver.serve(world, _build(world, reference), requests, record_logits=True)
    if world.at.is_sampler:
        _check_logits(run, reference)
    if world.at.rank == 0:
        assert [run.tokens[row] for row in range(len(reference.prompts))] == reference.tokens


def test_replay_goes_on_where_it_was(world: World, references: dict[str, FamilyReference]) -> None:
    """As after a world's death: prompt and a part of the output come in, and the rest is the same."""
    reference = references["starcoder2"]
    done = 5
    requests = [
        driver.request(row, prompt, NUM_TOKENS, output=reference.tokens[row][:done])
        for row, prompt in enumerate(reference.prompts)
    ]
    run = driver.serve(world, _build(world, reference), requests, record_logits=True)
    if world.at.is_sampler:
        _check_logits(run, reference, from_token=done)
    if world.at.rank == 0:
        assert [run.tokens[row] for row in range(2)] == [tokens[done:] for tokens in reference.tokens]


def test_preempted_and_from_the_prefix_cache(world: World, references: dict[str, FamilyReference]) -> None:
    """Too few blocks for all, and prompts that begin alike."""
    reference = references["gpt-neox"]
    prompt, tokens = reference.prompts[0], reference.tokens[0]
    engine = _build(world, reference)
    run = driver.serve(
        world, engine, [driver.request(row, prompt, NUM_TOKENS) for row in range(4)], kv_blocks=9
    )
    if world.at.rank == 0:
        assert [run.tokens[row] for row in range(4)] == [tokens] * 4
        assert run.num_hit_tokens > 0


def test_prompt_logprobs(world: World, references: dict[str, FamilyReference]) -> None:
    """Of a prompt in three chunks. The head computes them from hidden states that were kept."""
    reference = references["cohere"]
    whole = reference.prompts[1] + reference.tokens[1]
    run = driver.serve(
        world, _build(world, reference), [driver.request(0, whole, 1, num_prompt_logprobs=1, num_logprobs=1)]
    )
    if world.at.rank == 0:
        (last,) = [token for token in run.news if token.prompt_logprobs]
        logits = reference.logits[1].astype(np.float64)
        expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        chosen = [expected[index, token] for index, token in enumerate(reference.tokens[1])]
        found = [entry.logprob for entry in last.prompt_logprobs[len(reference.prompts[1]) - 1 :]]
        assert found == pytest.approx(chosen, abs=1e-3)


def test_embeddings(world: World, references: dict[str, FamilyReference]) -> None:
    """The hidden state of the last token, after the model's last norm."""
    reference = references["opt"]
    prompt = reference.prompts[0]
    asked = driver.request(0, prompt, 0, pooling=Pooling(PoolingKind.LAST, normalize=False))
    run = driver.serve(world, _build(world, reference), [asked])
    if world.at.rank == 0:
        (found,) = [np.frombuffer(news.pooled, dtype="<f4") for news in run.news if news.pooled is not None]
        model = transformers.AutoModelForCausalLM.from_pretrained(reference.folder, dtype=torch.float32)
        with torch.inference_mode():
            expected = model.base_model(torch.tensor([prompt])).last_hidden_state[0, -1].numpy()
        assert np.abs(found - expected).max() < 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_is_near(world: World, references: dict[str, FamilyReference], name: str) -> None:
    reference = references[name]
    requests = [driver.request(row, prompt, 1) for row, prompt in enumerate(reference.prompts)]
    run = driver.serve(world, _build(world, reference, dtype="bfloat16"), requests, record_logits=True)
    if world.at.is_sampler:
        for row, prompt in enumerate(reference.prompts):
            error = np.abs(run.logits[row, len(prompt)] - reference.logits[row, 0]).mean()
            assert error < 0.1 * reference.logits.std(), f"prompt {row}: logits differ by {error} on average"


def test_a_wrong_cut_is_refused(
    world: World, references: dict[str, FamilyReference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AutoTP goes by names: where it takes a layer for another kind, shapes may still fit together."""
    if world.at.tp == 1:
        pytest.skip("nothing is cut")
    cut = loading.cut_linears

    def cut_and_spoil(model: torch.nn.Module, group: TensorGroup, tp_rank: int) -> None:
        cut(model, group, tp_rank)
        if tp_rank == 1:
            weight = model.get_parameter("model.layers.1.mlp.c_proj.weight")
            weight.data = weight.data.roll(1, dims=1)

    monkeypatch.setattr(loading, "cut_linears", cut_and_spoil)
    if world.at.is_sampler:
        with pytest.raises(ModelError, match=r"computes something else.*try --tp 1"):
            _build(world, references["starcoder2"])
    else:
        # The others have done their part; the world would end while they wait for the sampler.
        monkeypatch.setattr(type(world.control), "barrier", _ended)
        with pytest.raises(_EndedError):
            _build(world, references["starcoder2"])


class _EndedError(Exception):
    pass


def _ended(_control: object) -> None:
    raise _EndedError
