"""Linear layers with weights in fp8 (e4m3), and a scale for each output row.

One rule says what is multiplied, on every device. Forwards of up to `FEW` tokens a row multiply the
activations as they are: reading the weights bounds them. Longer ones quantize each token's
activations, too, with a scale of its own, and multiply fp8 with fp8. A token's scales depend on no
other token, and the rule on no other row of the batch.

Kernels: for one row `linear.triton_row`, for a few `linear.triton_few`, for many
`torch._scaled_mm`. Without them (`has_kernels`) torch multiplies the same numbers in the
activations' precision: no faster than plain weights, and slower where little else is done.

Axes: M tokens, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from star_attention.attention.kernels import triton_works
from star_attention.errors import InvalidInputError
from star_attention.planning.model_shape import FP8_STEP

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max

FEW = 64
"""Tokens of a row up to which a forward multiplies activations as they are."""

_SMALLEST = 1e-30
"""Least amount that a row is scaled by: a row of zeros has a scale, too."""


def quantize(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of a tensor in fp8, and the scale of each, fp32 `[..., 1]`.

    The largest element of a row becomes the largest number of e4m3, 448.
    """
    x_MK = x_MK.float()
    largest_M1 = x_MK.abs().amax(-1, keepdim=True).clamp(min=_SMALLEST)
    # Rounded up, the largest element would be beyond the range, where e4m3 has no infinity.
    q_MK = (x_MK * (LARGEST / largest_M1)).clamp(-LARGEST, LARGEST)
    # Not divided by it, which CPUs and GPUs round differently: identities are of bits.
    return q_MK.to(DTYPE), largest_M1 * (1 / LARGEST)


def has_kernels(device: torch.device) -> bool:
    """True if a device multiplies fp8, and our kernels run on it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9) and triton_works(device)


def is_few(x: Tensor) -> bool:
    """True for activations `[..., tokens, K]` that are multiplied as they are."""
    return x.dim() < 2 or x.shape[-2] <= FEW


def linear(
    x: Tensor, weight_NK: Tensor, scale_N: Tensor, bias_N: Tensor | None, *, kernels: bool = False
) -> Tensor:
    """Multiply activations `[..., K]` with a weight in fp8, to `[..., N]`.

    Args:
        x: the activations, in a precision of their own.
        weight_NK: the weight, or rows or columns of it.
        scale_N: the scale of each of its rows, fp32.
        bias_N: the bias, or None.
        kernels: the value of `has_kernels` for the device.

    Raises:
        InvalidInputError: activations in fp8, which have lost their scale.
    """
    if x.dtype == weight_NK.dtype:
        raise InvalidInputError(
            "this model converts activations to its weights' precision, which weights in fp8 do"
            " not allow; load it without weights"
        )
    if not is_few(x):
        out = _quantized(x, weight_NK, scale_N, kernels=kernels)
    elif kernels and (x.dtype != torch.float32 or x.numel() == x.shape[-1]):
        from star_attention.linear import triton_row

        out = triton_row.linear(x, weight_NK, None, scale=scale_N)
    else:
        out = _as_they_are(x, weight_NK, scale_N)
    return out if bias_N is None else out + bias_N


def _quantized(x: Tensor, weight_NK: Tensor, scale_N: Tensor, *, kernels: bool) -> Tensor:
    """Multiply activations in fp8."""
    q, scale_M1 = quantize(x)
    N, K = weight_NK.shape
    if kernels and x.dtype == torch.bfloat16 and N % FP8_STEP == K % FP8_STEP == 0:
        out_MN: Tensor = torch._scaled_mm(
            q.reshape(-1, K),
            # Columns of a weight are copied: not every kernel reads them where they are.
            weight_NK.contiguous().t(),
            scale_a=scale_M1.reshape(-1, 1),
            scale_b=scale_N[None],
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return out_MN.view(*x.shape[:-1], N)
    dtype = _product_dtype(x)
    out = functional.linear(_converted(q, dtype), _converted(weight_NK, dtype))
    return (out.float() * scale_M1 * scale_N).to(x.dtype)


def _as_they_are(x: Tensor, weight_NK: Tensor, scale_N: Tensor) -> Tensor:
    dtype = _product_dtype(x)
    out = functional.linear(x.to(dtype), _converted(weight_NK, dtype))
    return (out.float() * scale_N).to(x.dtype)


def _converted(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers in fp8 in another precision, which holds all of them."""
    if numbers.device.type != "cpu":
        return numbers.to(dtype)
    # On a CPU torch converts them one by one; looking them up takes a quarter of the time.
    table = torch.arange(256, dtype=torch.uint8).view(DTYPE).to(dtype)
    places = numbers.contiguous().view(torch.uint8).reshape(-1).int()
    return table.index_select(0, places).view(numbers.shape)


def _product_dtype(x: Tensor) -> torch.dtype:
    """Return the precision of a product with numbers up to 448, which fp16 cannot sum."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def share_quantizing(graph: torch.fx.Graph) -> None:
    """Quantize activations once that several layers of a compiled graph multiply.

    torch.compile leaves equal operations in a graph that has no gradients.
    """
    first: dict[Any, Any] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in _PURE:
            continue
        key = repr((node.target, node.args, node.kwargs))
        if key in first:
            node.replace_all_uses_with(first[key])
            graph.erase_node(node)
        else:
            first[key] = node


_PURE = {
    torch.ops.aten.abs.default,
    torch.ops.aten.amax.default,
    torch.ops.aten.clamp_max.default,
    torch.ops.aten.clamp_min.default,
    torch.ops.aten.div.Tensor,
    torch.ops.aten.mul.Tensor,
    torch.ops.aten.reciprocal.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.view.default,
    torch.ops.prims.convert_element_type.default,
}
"""Operations that quantizing consists of, in the graphs of torch.compile."""


class Fp8Linear(nn.Linear):
    """A linear layer whose weight is in fp8.

    Attributes:
        weight: in fp8, `[N, K]`.
        scale: of each of its rows, fp32 `[N]`.
        has_kernels: True where our kernels run.
    """

    scale: Tensor
    has_kernels: bool

    @staticmethod
    def convert(layer: nn.Linear, device: torch.device | str | None = None) -> None:
        """Make a plain linear layer one in fp8, in place: whoever holds it holds this one.

        Args:
            layer: the layer.
            device: where the layer is moved; None for where it is.
        """
        weight = layer.weight.detach().to(device)
        q_NK, scale_N1 = quantize(weight)
        layer.weight = nn.Parameter(q_NK, requires_grad=False)
        layer.register_buffer("scale", scale_N1[:, 0].contiguous())
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach().to(device), requires_grad=False)
        layer.__class__ = Fp8Linear
        assert isinstance(layer, Fp8Linear)
        layer.has_kernels = has_kernels(q_NK.device)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply `[..., K]` to `[..., N]`."""
        return linear(input, self.weight, self.scale, self.bias, kernels=self.has_kernels)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move with the model: `model.half()` leaves the weight's bytes and scales alone."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            is_own = tensor is self.scale or tensor.dtype == DTYPE
            return tensor.to(new.device) if is_own and new.dtype != tensor.dtype else new

        super()._apply(moved, recurse)
        self.has_kernels = has_kernels(self.weight.device)
        return self
