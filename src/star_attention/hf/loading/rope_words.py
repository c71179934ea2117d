"""How rotary scaling is written by users: checked before torch is imported."""

from __future__ import annotations

import json
import math
from typing import Any

from star_attention.errors import InvalidInputError, quote

SETTINGS = ("rope_scaling", "rope_parameters", "rope_theta")
"""Arguments of `from_pretrained` about rotary positions."""

_SHORT_TYPES = ("linear", "dynamic", "yarn")
FORM = "write TYPE:FACTOR, like yarn:4, or a JSON object with rope_type and its settings"


def parse(text: str) -> dict[str, Any]:
    """Parse `yarn:4`, `yarn:4:32768` (factor and original length) or a JSON object.

    Raises:
        InvalidInputError: it is neither.
    """
    if text.lstrip().startswith("{"):
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise InvalidInputError(
                f"rope scaling {quote(text)} is not JSON: {error}; {FORM}"
            ) from None
        assert isinstance(settings, dict)
        return settings
    name, *numbers = text.split(":")
    if name not in _SHORT_TYPES or not 1 <= len(numbers) <= 2:
        raise InvalidInputError(
            f"rope scaling {quote(text)} is unknown; {FORM} (TYPE: {', '.join(_SHORT_TYPES)})"
        )
    try:
        settings = {"rope_type": name, "factor": float(numbers[0])}
        if len(numbers) > 1:
            settings["original_max_position_embeddings"] = int(numbers[1])
    except ValueError:
        raise InvalidInputError(
            f"rope scaling {quote(text)}: expected numbers after {name}; {FORM}"
        ) from None
    return settings


def take(model_kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split arguments of `from_pretrained` into rotary settings and the others.

    Raises:
        InvalidInputError: settings of another form.
    """
    others = {name: value for name, value in model_kwargs.items() if name not in SETTINGS}
    settings: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = model_kwargs.get(name)
        if isinstance(value, str):
            value = parse(value)
        if value is not None and not isinstance(value, dict):
            raise InvalidInputError(
                f"{name} {quote(value)}: expected a dict or TYPE:FACTOR; {FORM}"
            )
        settings |= value or {}
    if model_kwargs.get("rope_theta") is not None:
        settings.setdefault("rope_theta", model_kwargs["rope_theta"])
    check_numbers(settings)
    return settings, others


def check_numbers(settings: dict[str, Any]) -> None:
    """Refuse rotary settings whose numbers cannot be."""
    for key, least in (("factor", 1), ("original_max_position_embeddings", 1), ("rope_theta", 1)):
        value = settings.get(key)
        if value is None:
            continue
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value < least:
            raise InvalidInputError(
                f"rope_scaling has {key} {quote(value)}; expected a number of at least {least}"
            )
