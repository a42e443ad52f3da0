"""The native functions as Python sees them: their structures, the kernels of one instruction set, and the shared sum.

Called by `stage` and by tests. Nothing here knows a model. Pointers that go into structures are not kept alive
by them: whoever fills them in keeps the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_float, c_int64, c_void_p

import torch

from engine.kernels.library import KernelsUnavailable, instruction_sets, load
from engine.kernels.quantization import Quantization, quantization_of

_FORMATS = {torch.float32: 0, torch.bfloat16: 1}
_QUANTIZED_FORMATS = {Quantization.INT8: 2, Quantization.INT4: 3}


class LinearStruct(ctypes.Structure):
    _fields_ = [
        ("weights", c_void_p),
        ("bias", c_void_p),
        ("num_outputs", c_int64),
        ("num_inputs", c_int64),
        ("format", c_int64),
    ]


class ExpertsStruct(ctypes.Structure):
    _fields_ = [
        ("router", LinearStruct),
        ("gate_ups", POINTER(LinearStruct)),
        ("downs", POINTER(LinearStruct)),
        ("count", c_int64),
        ("per_token", c_int64),
        ("first_held", c_int64),
        ("num_held", c_int64),
        ("normalized", c_int64),
    ]


class LayerStruct(ctypes.Structure):
    _fields_ = [
        ("attention_norm", c_void_p),
        ("attention_post_norm", c_void_p),
        ("mlp_norm", c_void_p),
        ("mlp_post_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("query_projection_norm", c_void_p),
        ("key_projection_norm", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("rotary_dim", c_int64),
        ("window", c_int64),
        ("qkv", LinearStruct),
        ("output", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("experts", POINTER(ExpertsStruct)),
    ]


class StageStruct(ctypes.Structure):
    _fields_ = [
        ("hidden_size", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("activation", c_int64),
        ("num_layers", c_int64),
        ("kv_of_head", c_void_p),
        ("layers", POINTER(LayerStruct)),
        ("norm_eps", c_float),
        ("attention_scale", c_float),
        ("attention_soft_cap", c_float),
        ("residual_multiplier", c_float),
        ("parts", c_int64),
        ("query_columns", c_int64),
        ("key_columns", c_int64),
        ("first_counted", c_int64),
        ("end_counted", c_int64),
    ]


EXTENT_WHOLE, EXTENT_KEYS, EXTENT_REST = range(3)
"""What of a layer a step computes: all; only keys and values; or the rest, of rows that have those in the cache."""


class StepStruct(ctypes.Structure):
    _fields_ = [
        ("num_tokens", c_int64),
        ("num_sequences", c_int64),
        ("positions", c_void_p),
        ("slots", c_void_p),
        ("first_rows", c_void_p),
        ("block_rows", c_void_p),
        ("block_tables", c_void_p),
        ("table_stride", c_int64),
        ("extent", c_int64),
    ]


class SharedSumStruct(ctypes.Structure):
    _fields_ = [
        ("memory", c_void_p),
        ("rank", c_int64),
        ("size", c_int64),
        ("segment_bytes", c_int64),
        ("capacity", c_int64),
        ("crowded", c_int64),
        ("round", c_int64),
        ("phase", c_int64),
        ("done", c_int64),
        ("parts_done", c_int64),
        ("begun", c_void_p),
        ("begun_at_ns", c_void_p),
        ("waited_ns", c_int64),
    ]


class SharedSum:
    """The sum over the ranks of a host through memory that they share. Every rank makes one, with the same sizes."""

    HEAD_BYTES = 128
    """Of a rank's segment, before its two buffers."""

    def __init__(self, address: int, rank: int, size: int, capacity: int, crowded: bool) -> None:
        """`address`: of `size * segment_bytes(capacity)` bytes, zeros at first, at a multiple of 64. Raises
        KernelsUnavailable."""
        library = load()
        self._call = library.phalanx_sum_shared
        self._functions = library.phalanx_functions(instruction_sets()[0].encode())
        self.struct = SharedSumStruct(address, rank, size, self.segment_bytes(capacity), capacity, crowded)

    @property
    def waited_s(self) -> float:
        """How long `Kernels.summed_parts` has waited for other ranks so far."""
        return float(self.struct.waited_ns / 1e9)

    def show_progress_at(self, begun: int, begun_at_ns: int) -> None:
        """Addresses of two words of 64 bits, which outlive this: to the first `Kernels.summed_parts` adds each sum
        as it begins, and into the other it writes when that was (CLOCK_MONOTONIC, ns)."""
        self.struct.begun, self.struct.begun_at_ns = begun, begun_at_ns

    @classmethod
    def segment_bytes(cls, capacity: int) -> int:
        """Of one rank, for messages of up to `capacity` elements; longer ones go in pieces."""
        return cls.HEAD_BYTES + 2 * 4 * capacity

    def sum(self, data: torch.Tensor, meanwhile: Callable[[], object]) -> None:
        """Replaces float32 `data`, which is contiguous and as large on every rank, by the sum over the ranks, taken
        in their order. Waits for all of them, and calls `meanwhile` from time to time as long as it does."""
        address, count = data.data_ptr(), data.numel()
        while self._call(self._functions, byref(self.struct), address, count):
            meanwhile()


class Kernels:
    """The functions of one instruction set, with threads and scratch memory. Not for several threads at once."""

    def __init__(self, library: ctypes.CDLL, instruction_set: str, threads: int) -> None:
        self.instruction_set = instruction_set
        self.threads = threads
        self._library = library
        self._functions = library.phalanx_functions(instruction_set.encode())
        self._context = library.phalanx_open(threads)

    def close(self) -> None:
        """Ends the threads and frees the scratch memory."""
        if self._context:
            self._library.phalanx_close(self._context)
            self._context = None

    def parts(
        self,
        stage: StageStruct,
        step: StepStruct,
        begin: int,
        end: int,
        hidden: torch.Tensor,
        delta: torch.Tensor | None,
        partial: torch.Tensor,
    ) -> None:
        """Parts `begin` to `end` - 1 of the stage; see kernels.h. `hidden`, `partial`: `[num_tokens, hidden_size]`
        float32; `delta`: the same, or what the part before brought."""
        self._library.phalanx_parts(
            self._functions, self._context, byref(stage), byref(step), begin, end,
            hidden.data_ptr(), None if delta is None else delta.data_ptr(), partial.data_ptr(),
        )  # fmt: skip

    def summed_parts(
        self,
        stage: StageStruct,
        step: StepStruct,
        begin: int,
        end: int,
        sums: SharedSum,
        hidden: torch.Tensor,
    ) -> bool:
        """Parts `begin` to `end` - 1 with the sums over the ranks, in `hidden` `[num_tokens, hidden_size]` float32,
        which has at most `capacity` elements. False: other ranks kept it waiting; call it again until it is True."""
        left: int = self._library.phalanx_summed_parts(
            self._functions,
            self._context,
            byref(stage),
            byref(step),
            begin,
            end,
            byref(sums.struct),
            hidden.data_ptr(),
        )
        return left == 0

    def linear(self, linear: LinearStruct, x: torch.Tensor) -> torch.Tensor:
        """`x` `[num_rows, num_inputs]` float32 to `[num_rows, num_outputs]` float32."""
        out = torch.empty(x.shape[0], linear.num_outputs)
        self._library.phalanx_linear(
            self._functions, self._context, byref(linear), _rows(x).data_ptr(), x.shape[0],
            out.data_ptr(), linear.num_outputs,
        )  # fmt: skip
        return out

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """RMSNorm of `[num_rows, size]` float32."""
        out = torch.empty_like(x)
        self._library.phalanx_norm(
            self._functions, self._context, _rows(x).data_ptr(), x.shape[0], x.shape[1],
            weight.data_ptr(), eps, out.data_ptr(),
        )  # fmt: skip
        return out

    def embed(
        self, table: LinearStruct, token_ids: torch.Tensor, first_id: int, multiplier: float
    ) -> torch.Tensor:
        """Rows of a packed table `[num_ids, size]` float32, times `multiplier`; zeros for ids outside of it."""
        out = torch.empty(token_ids.shape[0], table.num_inputs)
        self._library.phalanx_embed(
            self._functions, self._context, byref(table), token_ids.data_ptr(), token_ids.shape[0],
            first_id, multiplier, out.data_ptr(),
        )  # fmt: skip
        return out

    def logits(
        self,
        head: LinearStruct,
        hidden: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        divisor: float,
        soft_cap: float,
    ) -> torch.Tensor:
        """`[num_rows, hidden_size]` float32 to `[num_rows, num_outputs]`: norm, head, division, soft cap."""
        out = torch.empty(hidden.shape[0], head.num_outputs)
        self._library.phalanx_logits(
            self._functions, self._context, byref(head), _rows(hidden).data_ptr(), hidden.shape[0],
            norm_weight.data_ptr(), eps, divisor, soft_cap, out.data_ptr(),
        )  # fmt: skip
        return out

    def greatest(
        self,
        head: LinearStruct,
        hidden: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        divisor: float,
        soft_cap: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each row's `logits` the greatest, float32 `[num_rows]`, and the first output that has it, int64."""
        values = torch.empty(hidden.shape[0])
        ids = torch.empty(hidden.shape[0], dtype=torch.int64)
        self._library.phalanx_greatest(
            self._functions, self._context, byref(head), _rows(hidden).data_ptr(), hidden.shape[0],
            norm_weight.data_ptr(), eps, divisor, soft_cap, values.data_ptr(), ids.data_ptr(),
        )  # fmt: skip
        return values, ids


def linear_struct(
    packed: torch.Tensor, num_outputs: int, num_inputs: int, bias: torch.Tensor | None = None
) -> LinearStruct:
    """Weights as `packing` or `quantization` packs them; `bias` `[num_outputs]` float32."""
    quantization = quantization_of(packed)
    return LinearStruct(
        packed.data_ptr(), None if bias is None else bias.data_ptr(), num_outputs, num_inputs,
        _FORMATS[packed.dtype] if quantization is Quantization.NONE else _QUANTIZED_FORMATS[quantization],
    )  # fmt: skip


def open_kernels(threads: int, instruction_set: str = "auto") -> Kernels:
    """The kernels of the best instruction set of this machine, or of the one that is named.

    Raises KernelsUnavailable.
    """
    if instruction_set == "off":
        raise KernelsUnavailable("native kernels are switched off (--kernels off or PHALANX_KERNELS=off)")
    library = load()
    available = instruction_sets()
    if instruction_set == "auto":
        instruction_set = available[0]
    if not library.phalanx_functions(instruction_set.encode()):
        raise KernelsUnavailable(
            f"--kernels {instruction_set} does not run on this machine; what does: {', '.join(available)}"
        )
    return Kernels(library, instruction_set, threads)


def _rows(x: torch.Tensor) -> torch.Tensor:
    assert x.dtype == torch.float32 and x.is_contiguous(), "kernels read contiguous float32 rows"
    return x
