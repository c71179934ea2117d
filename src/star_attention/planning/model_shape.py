"""The sizes of a model that decide what it costs; `hf/shape.py` reads them off a config.

Standard library only.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from star_attention.errors import InvalidInputError

STORED_BYTES = {"fp8": 1}
"""Bytes of an element in each precision of `config.KV_DTYPES`."""

SCALE_BYTES = 4
"""Bytes of the fp32 scale of a quantized key or value (`storage.kv.QUANTIZERS`), and of an output
row of a linear layer in fp8."""

FP8_STEP = 16
"""What inputs and outputs of a linear layer in fp8 are multiples of (`torch._scaled_mm`)."""

FP8_ENDS = 1
"""Decoder layers at each end that are not held in fp8 (`hf.loading.fp8`)."""

TOKEN_ID_BYTES = 8
"""Bytes of a token's id, in a saved context beside keys and values."""


def most_compressed(compressed_size: int, plain_size: int, v_head_size: int) -> int:
    """Return the queries of a forward up to which it attends to compressed keys (MLA).

    A key's expansion takes `2 * compressed_size * (plain_size + v_head_size)` operations a head.
    Without it, each query takes `2 * (2 * compressed_size - plain_size - v_head_size)` more.

    Args:
        compressed_size: elements that keys and values are expanded from.
        plain_size: elements of a key that are.
        v_head_size: elements of a value.
    """
    expanded_size = plain_size + v_head_size
    # Where the compressed size is hardly larger, expanding is never less work.
    more = max(1, 2 * compressed_size - expanded_size)
    return compressed_size * expanded_size // more


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One attention call of a forward; most models have one per layer.

    Attributes:
        heads: query heads.
        kv_heads: heads of the keys and values that attention reads (after MLA's expansion).
        k_head_size: elements of a key.
        v_head_size: elements of a value.
        window: sliding window in tokens, None for full attention.
        compressed_size: elements that keys and values are expanded from and that phase 2 attends to
            instead (MLA); 0 if it cannot.
        rotary_size: elements of a key that are stored as they are beside them.
    """

    heads: int
    kv_heads: int
    k_head_size: int
    v_head_size: int
    window: int | None = None
    compressed_size: int = 0
    rotary_size: int = 0

    @property
    def flops_per_pair(self) -> int:
        """Operations per pair: `2 * k_head_size` for a score, `2 * v_head_size` for an output."""
        return 2 * self.heads * (self.k_head_size + self.v_head_size)

    @property
    def flops_per_compressed_pair(self) -> int:
        """Operations per pair of a query that is compressed, too (MLA)."""
        return 2 * self.heads * (2 * self.compressed_size + self.rotary_size)

    @property
    def most_compressed(self) -> int:
        """Queries of a forward up to which it attends to compressed keys, 0 for none."""
        if not self.compressed_size:
            return 0
        plain_size = self.k_head_size - self.rotary_size
        return most_compressed(self.compressed_size, plain_size, self.v_head_size)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes of a model that decide its cost.

    Attributes:
        name: model type.
        layers: number of layers.
        hidden_size: elements of a hidden state.
        attention: the attention calls of a forward, in order.
        kv_elements_by_layer: elements that each layer stores per context token: compressed ones for
            MLA, none for a layer that reads another layer's KV (KV sharing).
        kv_scales_per_token: scales stored with them in fp8, one per head of keys and of values.
        linear_parameters: weights of the layers that one token is multiplied with; in a mixture of
            experts, only those of the experts that a token is routed to.
        sharded_parameters: weights that tensor parallelism shards, 0 if it cannot run.
        all_reduced_elements_per_token: elements that tensor parallelism sums over its ranks.
        all_reduces: collectives per forward that do so.
        expansion_parameters: weights that every key is multiplied with each time it is attended to,
            unless it stays compressed (MLA's expansion).
        head_parameters: weights of the language-model head.
        parameters: all weights, tied ones once.
        bytes_per_element: of weights, keys and values as computed.
        quantizable_parameters: weights that may be held in fp8 (`hf.loading.fp8`).
        quantizable_rows: their output rows, each with a scale.
        weights: "fp8" if they are; None for plain weights.
    """

    name: str
    layers: int
    hidden_size: int
    attention: tuple[AttentionShape, ...]
    kv_elements_by_layer: tuple[int, ...]
    kv_scales_per_token: int
    linear_parameters: int
    sharded_parameters: int = 0
    all_reduced_elements_per_token: int = 0
    all_reduces: int = 0
    expansion_parameters: int = 0
    head_parameters: int
    parameters: int
    bytes_per_element: int
    quantizable_parameters: int = 0
    quantizable_rows: int = 0
    weights: str | None = None

    @property
    def most_compressed(self) -> int:
        """Queries of a forward up to which all layers attend to compressed keys, 0 for none."""
        return min((call.most_compressed for call in self.attention), default=0)

    @property
    def expanding(self) -> ModelShape:
        """The same model, where forwards of few tokens expand all keys, too."""
        calls = tuple(replace(call, compressed_size=0) for call in self.attention)
        return replace(self, attention=calls)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, with their scales."""
        return self._bytes_of(self.parameters)

    @property
    def linear_bytes(self) -> int:
        """Bytes of `linear_parameters`, which a token reads."""
        return self._bytes_of(self.linear_parameters)

    @property
    def sharded_bytes(self) -> int:
        """Bytes of `sharded_parameters`."""
        return self._bytes_of(self.sharded_parameters)

    @property
    def quantized_share(self) -> float:
        """Share of the operations of linear layers whose weights are in fp8."""
        if self.weights is None:
            return 0.0
        return min(1.0, self.quantizable_parameters / self.linear_parameters)

    def _bytes_of(self, parameters: int) -> int:
        """Return the bytes of so many weights, among them as many in fp8 as there can be."""
        plain = parameters * self.bytes_per_element
        if self.weights is None:
            return plain
        quantized = min(parameters, self.quantizable_parameters)
        scales = SCALE_BYTES * self.quantizable_rows * quantized // self.quantizable_parameters
        return plain - quantized * (self.bytes_per_element - STORED_BYTES["fp8"]) + scales

    def in_fp8(self) -> ModelShape:
        """Return the shape of the same model with linear layers in fp8.

        Raises:
            InvalidInputError: it has none that may be.
        """
        if not self.quantizable_parameters:
            raise InvalidInputError(
                f"{self.name} has no plain linear layers to hold in fp8; leave out weights"
            )
        return replace(self, weights="fp8")

    @property
    def kv_elements_per_token(self) -> int:
        """Elements stored per context token, all layers together."""
        return sum(self.kv_elements_by_layer)

    @property
    def kv_layers(self) -> int:
        """Layers that store KV."""
        return sum(elements > 0 for elements in self.kv_elements_by_layer)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of a token's keys and values as computed."""
        return self.kv_elements_per_token * self.bytes_per_element

    def stored_bytes_per_token(self, kv_dtype: str | None) -> int:
        """Return the bytes of a token's keys and values as stored.

        A quantized token also has a scale per head.
        """
        if kv_dtype is None:
            return self.kv_bytes_per_token
        element_bytes = STORED_BYTES[kv_dtype]
        return self.kv_elements_per_token * element_bytes + SCALE_BYTES * self.kv_scales_per_token

    def stored_bytes_by_window(self, kv_dtype: str | None) -> dict[int | None, int]:
        """Return the bytes of a token as stored in all layers with a window; None for the others.

        Layers without keys of their own are the last ones: their calls are left out.
        """
        element_bytes, scale_bytes = self.bytes_per_element, 0
        if kv_dtype is not None:
            element_bytes, scale_bytes = STORED_BYTES[kv_dtype], SCALE_BYTES
        sizes: Counter[int | None] = Counter()
        for elements, call in zip(self.kv_elements_by_layer, self.attention, strict=False):
            if elements and call.window is not None:
                sizes[call.window] += elements * element_bytes + 2 * call.kv_heads * scale_bytes
        rest = self.stored_bytes_per_token(kv_dtype) - sizes.total()
        return {None: rest, **sizes}
