"""Which layers of a context in host memory stay on the device."""

from __future__ import annotations

from typing import Any

from star_attention.errors import InvalidInputError, quote

BUFFERS = 3
"""Layers on their way to the device that have memory there: one is read, the next two arrive.

With two, the link waits between a forward's last layer and the next one's first.
"""


def stays(layer: int, layers: int, share: float) -> bool:
    """True if a layer's keys and values stay on the device, spread evenly over the layers.

    While such a layer computes, the next one from host memory has more time to arrive.

    Args:
        layer: number of the layer.
        layers: number of layers.
        share: share of the layers that stay, 0 to 1.
    """
    kept = staying(layers, share)
    return (layer + 1) * kept // layers > layer * kept // layers


def staying(layers: int, share: float) -> int:
    """Return how many layers stay: the share of them, rounded down."""
    # A share such as 0.29 of 100 is a little less than 29 in binary.
    return int(layers * share + 1e-6)


def on_device(
    stored: int, whole: int, computed: int, layers: int, kv_device: str | None, share: float
) -> tuple[int, int]:
    """Return the bytes of a context that stay on a device, and those of layers that arrive there.

    Args:
        stored: bytes of all layers as they are stored.
        whole: bytes that these would take if none kept its last window alone: buffers are as large
            as the largest layer.
        computed: bytes as they are computed with; of one layer at a time, if these are more.
        layers: layers that store keys and values.
        kv_device, share: the settings `kv_device` and `kv_resident`.
    """
    if kv_device is None:
        return stored, 0
    layers = max(1, layers)
    kept = staying(layers, share)
    arriving = min(BUFFERS, layers - kept) * whole // layers
    converted = computed // layers if arriving and computed > whole else 0
    return stored * kept // layers, arriving + converted


def check_share(share: Any, kv_device: str | None) -> float:
    """Return the setting `kv_resident` as a number.

    Raises:
        InvalidInputError: it is not a share, or has no effect.
    """
    try:
        number = None if isinstance(share, bool) else float(share)
    except (TypeError, ValueError):
        number = None
    if number is None or not 0 <= number <= 1:
        raise InvalidInputError(
            f"kv_resident {quote(share)} is not a number from 0 to 1; give the share of the layers"
            " that stay on the device"
        )
    if number and kv_device is None:
        raise InvalidInputError(
            f"kv_resident {number:g} has no effect without kv_device: all layers stay on the"
            ' device; give kv_device="cpu" (--kv-device cpu), or leave it out'
        )
    return number
