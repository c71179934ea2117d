"""Devices and links to make estimates for, by name or by values. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from star_attention.errors import InvalidInputError, quote
from star_attention.planning.cost import Flops


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device and its link to the others.

    Attributes:
        name: what to call it.
        matrix: operations per second of linear layers.
        attention: operations per second of attention.
        bandwidth: bytes per second of its memory.
        memory: bytes of its memory.
        link: payload bytes per second, sent and received at the same time.
        latency: seconds of a collective or a message.
        gap: seconds that a layer of a decode step takes beyond reading bytes.
        exchange: seconds of a collective of a few kilobytes in a decode step; 0 for `latency`.
        matrix_fp8: operations per second of linear layers in fp8, with quantizing; 0 for `matrix`.

    Raises:
        InvalidInputError: a rate or size that is not above 0, or a negative one of the last two.
    """

    name: str
    matrix: float
    attention: float
    bandwidth: float
    memory: float
    link: float
    latency: float
    gap: float = 0.0
    exchange: float = 0.0
    matrix_fp8: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _REQUIRED and not value > 0:
                raise InvalidInputError(f"hardware {field.name} {quote(value)} is not above 0")
            if field.name in _OPTIONAL and not value >= 0:
                raise InvalidInputError(f"hardware {field.name} {quote(value)} is negative")

    def seconds(self, flops: Flops) -> float:
        """Return the seconds that operations take."""
        linear = flops.linear + flops.expansion + flops.head
        return linear / self.matrix + flops.attention / self.attention

    def with_fp8(self, share: float) -> Hardware:
        """Return the device with the rate of linear layers of which a share is in fp8."""
        if not share or not self.matrix_fp8:
            return self
        matrix = 1 / (share / self.matrix_fp8 + (1 - share) / self.matrix)
        # Once: what is derived of this one has the same weights.
        return replace(self, matrix=matrix, matrix_fp8=0.0)

    @property
    def exchange_s(self) -> float:
        """Seconds of a collective of a few kilobytes in a decode step."""
        return self.exchange or self.latency


_OPTIONAL = ("gap", "exchange", "matrix_fp8")
_REQUIRED = tuple(
    field.name for field in fields(Hardware) if field.name not in ("name", *_OPTIONAL)
)

# An H200, measured with this library in bf16; the files are those of bench/results.
# matrix, attention: fit to whole encodings, with norms, merges and launches in them (star and dense
#     at 128K, star at 512K: 2026-11-25-h200-prefill.json, 2026-11-26-h200-prefill-512k.json).
# matrix_fp8: the same times 1,196 / 653, the rates of a product alone at 16,384 tokens, in fp8 with
#     quantizing and in bf16; to be fitted to whole encodings.
# bandwidth: a copy. gap, exchange: what remains of a token at 16K and 128K, on one GPU (from
#     2026-11-26-h200-decode.json on) and on two (2026-11-30-h200-ranks-late-decode.json). Half of
#     the gap is in the four products of a layer, 3 to 4 us each that do not shrink with slices. A
#     collective of 8 KB takes 2.7 to 3.9 us in a CUDA graph, some of it in the place of kernels
#     that one rank has too (2026-11-30-h200.md).
# Links are four fifths of their nominal rates: NVLink 4 has 450 GB/s each way, one 400 Gbit/s
# adapter per device 50 GB/s, NVLink 3 300 GB/s, 10 Gbit/s Ethernet 1.25 GB/s.
HARDWARE = {
    device.name: device
    for device in (
        Hardware(
            name="h200-nvlink",
            matrix=610e12,
            matrix_fp8=1117e12,
            attention=625e12,
            bandwidth=4.3e12,
            memory=141e9,
            link=360e9,
            latency=15e-6,
            gap=26e-6,
            exchange=2.5e-6,
        ),
        Hardware(
            name="h200-ib",
            matrix=610e12,
            matrix_fp8=1117e12,
            attention=625e12,
            bandwidth=4.3e12,
            memory=141e9,
            link=40e9,
            latency=30e-6,
            gap=26e-6,
        ),
        Hardware(
            name="a100-nvlink",
            matrix=240e12,
            attention=190e12,
            bandwidth=1.7e12,
            memory=80e9,
            link=240e9,
            latency=20e-6,
        ),
        Hardware(
            name="cpu-ethernet",
            matrix=1e12,
            attention=0.5e12,
            bandwidth=1e11,
            memory=256e9,
            link=1e9,
            latency=100e-6,
        ),
    )
}


def parse_hardware(text: str) -> Hardware:
    """Parse a description of hardware.

    Args:
        text: a known name (`h200-ib`), values (`matrix=7e14,link=4e10,...`), or a name followed by
            values that replace some of its own.

    Raises:
        InvalidInputError: an unknown name or field, a value that is not a number, or values alone
            that leave out a field.
    """
    name, *settings = [part.strip() for part in text.split(",")]
    if "=" in name:
        name, settings = "", [name, *settings]
    elif name not in HARDWARE:
        raise InvalidInputError(
            f"hardware {quote(name)} is unknown; choose one of {', '.join(HARDWARE)}, or"
            " give values"
        )
    known = [*_REQUIRED, *_OPTIONAL]
    values: dict[str, float] = {}
    for setting in settings:
        field, equals, value = setting.partition("=")
        if field not in known or not equals:
            raise InvalidInputError(
                f"hardware {quote(setting)} is unknown; give {'=, '.join(known)}="
            )
        try:
            values[field] = float(value)
        except ValueError:
            raise InvalidInputError(
                f"hardware {field} {quote(value)} is not a number; write {field}=1e9"
            ) from None
    if name:
        return replace(HARDWARE[name], **values, name=text) if values else HARDWARE[name]
    missing = [field for field in _REQUIRED if field not in values]
    if missing:
        raise InvalidInputError(
            f"hardware {quote(text)} lacks {', '.join(missing)}; add them, or begin with a"
            " known name"
        )
    return Hardware(name=text, **values)


def calibrate(base: Hardware, samples: Sequence[tuple[Flops, float]], bandwidth: float) -> Hardware:
    """Return `base` with rates fitted to measurements (`fit_rates`) and a measured bandwidth."""
    matrix, attention = fit_rates(samples)
    return replace(
        base,
        matrix=matrix,
        attention=attention,
        bandwidth=bandwidth,
        name=f"{base.name}, calibrated",
    )


def fit_rates(samples: Sequence[tuple[Flops, float]]) -> tuple[float, float]:
    """Fit the rates of linear layers and of attention to measured times.

    Minimizes the squared relative errors of `linear / rate + attention / rate`.

    Args:
        samples: operations, and the seconds that they took.

    Returns:
        Operations per second of linear layers, and of attention.

    Raises:
        InvalidInputError: the samples do not determine both rates.
    """
    # Unknowns: seconds per operation, x of linear layers and y of attention. Each row is scaled to
    # a result of 1.
    rows = [(flops.linear / seconds, flops.attention / seconds) for flops, seconds in samples]
    aa, ab, bb = (sum(row[i] * row[j] for row in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a1, b1 = (sum(row[i] for row in rows) for i in (0, 1))
    determinant = aa * bb - ab * ab
    x, y = (a1 * bb - b1 * ab, b1 * aa - a1 * ab) if determinant > 1e-9 * aa * bb else (0.0, 0.0)
    if not (x > 0 and y > 0):
        raise InvalidInputError(
            "the measurements do not separate the rates of linear layers and attention; measure"
            " dense attention at two lengths or more"
        )
    return determinant / x, determinant / y
