"""Native linears, norms and embeddings against torch in float64, and the promise that rows keep their bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.bindings import Kernels, linear_struct, open_kernels
from engine.kernels.library import KernelsUnavailable
from engine.kernels.packing import PANEL, Packer, pack, packed_shape
from tests.native_kernels import every_instruction_set

KERNELS = {
    (name, threads): open_kernels(threads, name) for name in every_instruction_set() for threads in (1, 3)
}
DTYPES = [torch.float32, torch.bfloat16]

every_path = pytest.mark.parametrize(
    "path", [(name, 1) for name in every_instruction_set()], ids=lambda p: p[0]
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])


@every_path
@every_dtype
@settings(max_examples=25, deadline=None)
@given(st.integers(1, 70), st.integers(1, 150), st.integers(1, 200), st.booleans(), st.integers(0, 2**32))
def test_linear_is_that_of_torch(
    path: tuple[str, int],
    dtype: torch.dtype,
    num_rows: int,
    num_outputs: int,
    num_inputs: int,
    has_bias: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, num_inputs, generator=random)
    weights = torch.randn(num_outputs, num_inputs, generator=random).to(dtype)
    bias = torch.randn(num_outputs, generator=random) if has_bias else None
    packed = pack(weights)
    found = KERNELS[path].linear(linear_struct(packed, num_outputs, num_inputs, bias), x)
    # What is multiplied may be rounded to the weights' type first; the sums are float32 either way.
    expected = x.double() @ weights.double().T
    size = x.double().abs() @ weights.double().abs().T
    if bias is not None:
        expected += bias
        size += bias.abs()
    tolerance = size * (2**-8 if dtype == torch.bfloat16 else num_inputs * 2**-23) + 1e-6
    assert ((found - expected).abs() <= tolerance).all()
    if dtype == torch.bfloat16:
        exact = x.bfloat16().float()
        again = KERNELS[path].linear(linear_struct(packed, num_outputs, num_inputs, bias), exact)
        expected += (exact.double() - x.double()) @ weights.double().T
        assert ((again - expected).abs() <= size * num_inputs * 2**-23 + 1e-6).all(), "sums are float32"


@every_path
@every_dtype
def test_rows_keep_their_bits_whatever_is_beside_them(path: tuple[str, int], dtype: torch.dtype) -> None:
    x, weights = torch.randn(530, 200), torch.randn(150, 200).to(dtype)
    packed = pack(weights)
    struct = linear_struct(packed, 150, 200)
    whole = KERNELS[path].linear(struct, x)
    for num_rows in [*range(1, 30), 64, 241, 500]:
        begin = (37 * num_rows) % (530 - num_rows)
        part = KERNELS[path].linear(struct, x[begin : begin + num_rows].contiguous())
        assert torch.equal(part, whole[begin : begin + num_rows]), f"{num_rows} rows"
    assert torch.equal(KERNELS[path[0], 3].linear(struct, x), whole), "three threads"


@every_path
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 50), st.integers(1, 300), st.integers(0, 2**32))
def test_norm_is_that_of_torch(path: tuple[str, int], num_rows: int, size: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(num_rows, size, generator=random) * 3, torch.randn(size, generator=random)
    found = KERNELS[path].norm(x, weight, 1e-5)
    expected = torch.nn.functional.rms_norm(x.double(), (size,), weight.double(), 1e-5)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(KERNELS[path].norm(x[-1:].contiguous(), weight, 1e-5), found[-1:])


@every_path
@every_dtype
def test_embedding_looks_up_packed_rows(path: tuple[str, int], dtype: torch.dtype) -> None:
    table = torch.randn(45, 21).to(dtype)
    packed = pack(table)
    ids = torch.tensor([100, 144, 99, 145, 117])  # of a vocabulary whose part begins at 100
    found = KERNELS[path].embed(linear_struct(packed, 45, 21), ids, 100, 2.0)
    expected = torch.zeros(5, 21)
    expected[[0, 1, 4]] = 2.0 * table[[0, 44, 17]].float()
    assert torch.equal(found, expected)


@every_path
@every_dtype
def test_logits_are_normed_divided_and_capped(path: tuple[str, int], dtype: torch.dtype) -> None:
    hidden, norm_weight = torch.randn(7, 40), torch.rand(40) + 0.5
    weights = torch.randn(99, 40).to(dtype)
    packed = pack(weights)
    found = KERNELS[path].logits(linear_struct(packed, 99, 40), hidden, norm_weight, 1e-6, 1.5, 4.0)
    normed = torch.nn.functional.rms_norm(hidden, (40,), norm_weight, 1e-6).to(dtype).float()
    expected = 4.0 * torch.tanh(normed @ weights.float().T / 1.5 / 4.0)
    assert (found - expected).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-5)


@every_path
@every_dtype
@pytest.mark.parametrize("num_rows", [1, 7, 30])
@pytest.mark.parametrize("soft_cap", [0.0, 4.0])
def test_the_greatest_logit_is_the_first_of_the_greatest_logits(
    path: tuple[str, int], dtype: torch.dtype, num_rows: int, soft_cap: float
) -> None:
    random = torch.Generator().manual_seed(num_rows)
    hidden, norm_weight = torch.randn(num_rows, 40, generator=random), torch.rand(40, generator=random) + 0.5
    weights = torch.randn(99, 40, generator=random).to(dtype)
    weights[50:99] = weights[1:50]  # every logit but two is there twice, far apart
    head = linear_struct(packed := pack(weights), 99, 40)
    assert packed.shape[0] * PANEL > 99  # what stands behind the last logit must not count
    arguments = head, hidden, norm_weight, 1e-6, 1.5, soft_cap
    values, ids = KERNELS[path].greatest(*arguments)
    expected = KERNELS[path].logits(*arguments).max(dim=1)
    assert torch.equal(values, expected.values)
    assert torch.equal(ids, expected.indices) and int(ids.max()) < 50
    below_zero = KERNELS[path].greatest(head, hidden, -norm_weight, 1e-6, 1.5, soft_cap)
    assert torch.equal(
        below_zero[0], KERNELS[path].logits(head, hidden, -norm_weight, 1e-6, 1.5, soft_cap).amax(1)
    )


@every_dtype
@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_parts_pack_as_the_whole(dtype: torch.dtype, parts: list[int], num_inputs: int) -> None:
    rows = torch.randn(sum(parts), num_inputs).to(dtype)
    packer = Packer()
    packed = torch.cat([*(packer.add(part) for part in rows.split(parts)), packer.finish()])
    assert packed.shape == packed_shape(tuple(rows.shape), dtype)
    assert torch.equal(packed, pack(rows))
    assert packed.numel() >= rows.numel() and packed.shape[0] == -(-sum(parts) // PANEL)


def test_what_cannot_be_opened_says_why() -> None:
    with pytest.raises(KernelsUnavailable, match=r"does not run on this machine; what does: .*portable"):
        open_kernels(1, "avx1024")
    with pytest.raises(KernelsUnavailable, match="PHALANX_KERNELS=off"):
        open_kernels(1, "off")


def test_threads_end_when_kernels_are_closed() -> None:
    kernels = open_kernels(4)
    assert isinstance(kernels, Kernels)
    kernels.norm(torch.randn(200, 8), torch.ones(8), 1e-6)
    kernels.close()
    kernels.close()
