"""A pipeline stage computed by the native kernels: the counterpart of `engine.models.decoder.DecoderStage`.

Called by the stage runner. Python hands over pointers once when the stage is built; a step is then one native
call, also where ranks sum through memory that they share; where MPI takes the sums, one for each part of a layer
(attention, MLP), with the sum between two.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from engine.collectives.base import TensorGroup
from engine.execution.batch import Batch
from engine.execution.kv_cache import KVCache
from engine.kernels.bindings import (
    EXTENT_KEYS,
    EXTENT_REST,
    EXTENT_WHOLE,
    ExpertsStruct,
    Kernels,
    LayerStruct,
    LinearStruct,
    StageStruct,
    StepStruct,
    linear_struct,
)
from engine.kernels.packing import padded
from engine.models.config import Activation, ExpertConfig, ModelConfig
from engine.models.families import QueryKeyNorm
from engine.models.rotary import rotary_tables
from engine.models.sharding import RankShape

Weights = dict[str, torch.Tensor]

_ACTIVATIONS = {Activation.SILU: 0, Activation.GELU_TANH: 1}


def cache_head_dim(config: ModelConfig) -> int:
    """Elements that the KV cache of a native stage holds for each head."""
    return padded(config.head_dim)


def step_struct(batch: Batch, extent: int = EXTENT_WHOLE) -> StepStruct:
    """What a step's native calls read. It points into the batch."""
    paged = batch.paged
    return StepStruct(
        batch.num_tokens, len(paged.handles), batch.positions.data_ptr(), batch.slots.data_ptr(),
        paged.first_rows.ctypes.data, paged.handles.ctypes.data, paged.block_tables.ctypes.data,
        paged.block_tables.shape[1], extent,
    )  # fmt: skip


class NativeStage:
    """The layers of one pipeline stage, as cut for one tensor-parallel rank, from packed weights."""

    def __init__(
        self,
        config: ModelConfig,
        shape: RankShape,
        weights: Weights,
        group: TensorGroup,
        max_positions: int,
        kernels: Kernels,
        dtype: torch.dtype,
    ) -> None:
        """`weights`: packed, or quantized. `dtype`: of the KV cache, and what the model was trained in."""
        self.dtype = dtype
        self.device = torch.device("cpu")
        self._config, self._shape = config, shape
        self._group = group
        self._kernels = kernels
        self._weights = weights
        self._kept: list[Any] = []  # what native structures point to
        # Rounded as the model's own type rounds it: so it was trained.
        self._embedding_multiplier = torch.tensor(config.embedding_multiplier, dtype=self.dtype).item()
        hidden_size = config.hidden_size
        if shape.has_embedding:
            self._embedding = self._linear("embed", len(shape.vocab), hidden_size)
        if shape.has_head:
            self._head = self._linear("head", len(shape.vocab), hidden_size)
            self._norm = self._norm_weight("norm.weight")
        self._rotaries: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}
        self._layers = (LayerStruct * len(shape.layers))()
        for struct, index in zip(self._layers, shape.layers, strict=True):
            self._fill(struct, index, max_positions)
        kv_of_head = torch.tensor(shape.q_to_kv, dtype=torch.int32)
        scale = config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        counted = shape.counted_kv_heads
        first_counted = counted.start - shape.kv_heads.start
        self._stage = StageStruct(
            hidden_size, shape.num_q_heads, shape.num_kv_heads, config.head_dim,
            _ACTIVATIONS[config.activation], len(shape.layers), self._pointer(kv_of_head), self._layers,
            config.rms_norm_eps, scale, config.attention_soft_cap or 0.0, config.residual_multiplier,
            3 if config.query_key_norm is QueryKeyNorm.PROJECTION else 2,
            config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim,
            first_counted, first_counted + len(counted),
        )  # fmt: skip
        self._cache: KVCache | None = None

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`[num_tokens]` to `[num_tokens, hidden_size]` float32. Each rank looks up the part of the vocabulary
        that it holds."""
        mine = self._kernels.embed(
            self._embedding, token_ids, self._shape.vocab.start, self._embedding_multiplier
        )
        return self._group.reduced(mine)

    def layers(self, hidden: torch.Tensor, batch: Batch, cache: KVCache) -> torch.Tensor:
        """Runs the stage's layers over `hidden` `[num_tokens, hidden_size]` float32, in place. After the model's last
        layer only the rows that the batch wants are right."""
        self._use(cache)
        step, num_layers = step_struct(batch), len(self._layers)
        wanted = batch.wanted_rows if self._shape.has_head else None
        if wanted is None:
            self._run(step, 0, num_layers, hidden)
            return hidden
        # The last layer's keys and values are needed of all rows, the rest of it only of those that are wanted.
        self._run(step, 0, num_layers - 1, hidden, step_struct(batch, EXTENT_KEYS))
        if len(wanted):
            rows, rest = batch.rows(wanted), hidden.index_select(0, wanted)
            self._run(step_struct(rows, EXTENT_REST), num_layers - 1, num_layers, rest)
            hidden.index_copy_(0, wanted, rest)
        return hidden

    def _run(
        self, step: StepStruct, begin: int, end: int, hidden: torch.Tensor, after: StepStruct | None = None
    ) -> None:
        """Layers `begin` to `end` - 1, and what the part after them begins with: adding what they brought. `after`:
        what is computed of that part, too."""
        run, stage, after = self._kernels.parts, self._stage, after or step
        first, last = stage.parts * begin, stage.parts * end
        sums = self._group.shared_sums(hidden.numel())
        partial = torch.empty_like(hidden)
        squares = partial.view(-1)[: 2 * len(hidden)]
        delta = None
        if sums is not None:
            # What the last of them brings is added, too.
            sums.drive(lambda shared: self._kernels.summed_parts(stage, step, first, last, shared, hidden))
        elif self._group.size == 1:
            if first < last:
                run(stage, step, first, last, hidden, None, partial)
                delta = partial
        else:
            for part in range(first, last):
                # What came in is added to the residual stream before anything is written to `partial`.
                run(stage, step, part, part + 1, hidden, delta, partial)
                brings_squares = stage.parts == 3 and part % 3 == 0
                delta = self._group.reduced(squares if brings_squares else partial)
        run(stage, after, last, last + 1, hidden, delta, partial)
        if stage.parts == 3 and after.extent == EXTENT_KEYS:
            # Keys go into the cache with their norms, which are another part.
            run(stage, after, last + 1, last + 2, hidden, self._group.reduced(squares), partial)

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last stage's hidden states as the head sees them: `[num_rows, hidden_size]` float32, to the same."""
        return self._kernels.norm(hidden.contiguous(), self._norm, self._config.rms_norm_eps)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """This rank's columns of the logits: `[num_rows, hidden_size]` to `[num_rows, len(vocab)]` float32."""
        config = self._config
        return self._kernels.logits(
            self._head, hidden, self._norm, config.rms_norm_eps, config.logit_divisor,
            config.logit_soft_cap or 0.0,
        )  # fmt: skip

    def greatest(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of each row the greatest of this rank's logits and the first token that has it, as float32 `[num_rows, 2]`:
        what `logits` would give, but a batch of them is not written to memory and read again."""
        config = self._config
        values, ids = self._kernels.greatest(
            self._head, hidden, self._norm, config.rms_norm_eps, config.logit_divisor,
            config.logit_soft_cap or 0.0,
        )  # fmt: skip
        return torch.stack((values, (ids + self._shape.vocab.start).float()), dim=1)

    def _fill(self, struct: LayerStruct, index: int, max_positions: int) -> None:
        config, shape, name = self._config, self._shape, f"layers.{index}."
        for norm in ("attention_norm", "attention_post_norm", "mlp_norm", "mlp_post_norm"):
            setattr(struct, norm, self._optional_norm(f"{name}{norm}.weight"))
        over = "projection_norm" if config.query_key_norm is QueryKeyNorm.PROJECTION else "norm"
        setattr(struct, f"query_{over}", self._optional_norm(f"{name}q_norm.weight"))
        setattr(struct, f"key_{over}", self._optional_norm(f"{name}k_norm.weight"))
        rope = config.rope_of(index)
        if rope is not None:
            if rope not in self._rotaries:
                self._rotaries[rope] = rotary_tables(rope, config.head_dim, max_positions)
            cosines, sines = self._rotaries[rope]
            struct.cosines, struct.sines = self._pointer(cosines), self._pointer(sines)
            struct.rotary_dim = 2 * cosines.shape[1]
        struct.window = config.window_of(index) or 0
        hidden_size, columns = config.hidden_size, len(shape.mlp_columns)
        attended = shape.num_q_heads * config.head_dim
        projected = attended + 2 * shape.num_kv_heads * config.head_dim
        struct.qkv = self._linear(f"{name}qkv", projected, hidden_size)
        struct.output = self._linear(f"{name}output", hidden_size, attended)
        if config.experts is not None:
            struct.experts = ctypes.pointer(self._experts(config.experts, name))
            return
        struct.gate_up = self._linear(f"{name}gate_up", 2 * columns, hidden_size)
        struct.down = self._linear(f"{name}down", hidden_size, columns)

    def _experts(self, experts: ExpertConfig, name: str) -> ExpertsStruct:
        hidden_size, columns, held = (
            self._config.hidden_size,
            len(self._shape.mlp_columns),
            self._shape.experts,
        )

        def each(matrix: str, num_outputs: int, num_inputs: int) -> Any:
            parts = self._weights[f"{name}{matrix}.weight"].chunk(len(held))
            structs = (LinearStruct * len(held))(
                *(linear_struct(part, num_outputs, num_inputs) for part in parts)
            )
            return ctypes.cast(structs, ctypes.POINTER(LinearStruct))

        return ExpertsStruct(
            self._linear(f"{name}router", experts.count, hidden_size),
            each("experts_gate_up", 2 * columns, hidden_size),
            each("experts_down", hidden_size, columns),
            experts.count, experts.per_token, held.start, len(held), experts.normalized,
        )  # fmt: skip

    def _linear(self, name: str, num_outputs: int, num_inputs: int) -> LinearStruct:
        bias = self._weights.get(f"{name}.bias")
        if bias is not None:
            bias = bias.float()
            self._kept.append(bias)
        return linear_struct(self._weights[f"{name}.weight"], num_outputs, num_inputs, bias)

    def _norm_weight(self, name: str) -> torch.Tensor:
        weight = self._weights[name].float() + self._config.norm_offset
        self._kept.append(weight)
        return weight

    def _optional_norm(self, name: str) -> int | None:
        return self._norm_weight(name).data_ptr() if name in self._weights else None

    def _pointer(self, tensor: torch.Tensor) -> int:
        tensor = tensor.contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _use(self, cache: KVCache) -> None:
        if cache is self._cache:
            return
        for struct, index in zip(self._layers, self._shape.layers, strict=True):
            struct.keys = cache.keys[index].data_ptr()
            struct.values = cache.values[index].data_ptr()
        self._cache = cache
        self._stage.layers = ctypes.cast(self._layers, ctypes.POINTER(LayerStruct))
