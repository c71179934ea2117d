"""A calibration: which layers of one model look back, and how far, as `calibrate` found it.

Standard library only: the file is read and checked before any weight is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from star_attention.errors import InvalidInputError, quote, quote_path
from star_attention.planning.lookback import parse_layers
from star_attention.planning.quality import BALANCED, HALF_LOOKS_BACK
from star_attention.planning.sizes import check_lookback

FORMAT, VERSION = "star-attention calibration", 1

LOOKBACK_SETTINGS = ("quality", "lookback", "lookback_layers")
"""Settings that go before a calibration's."""

_AGAIN = "run `star-attention calibrate` for this model"


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a calibration remembers of its model.

    Attributes:
        model_type: the family.
        layers: number of layers.
        config: hash of the config.
        dtype: precision that the weights were loaded in.
        weights: hash of samples of the weights, in that precision.
    """

    model_type: str
    layers: int
    config: str
    dtype: str
    weights: str

    @classmethod
    def of(cls, identity: Mapping[str, Any], layers: int) -> ModelFacts:
        """Shorten the identity of a model (`hf.loading.identity`)."""
        config = identity["config"]
        text = json.dumps(config, sort_keys=True)
        return cls(
            model_type=str(config.get("model_type")),
            layers=layers,
            config=hashlib.sha256(text.encode()).hexdigest()[:16],
            dtype=identity["dtype"],
            weights=str(identity["weights"])[:16],
        )

    def difference(self, other: ModelFacts) -> tuple[str, Any, Any] | None:
        """Return the first field that differs, with both values; weights of one precision only."""
        names = ["model_type", "layers", "config"]
        if self.dtype == other.dtype:
            names.append("weights")
        for name in names:
            values = getattr(self, name), getattr(other, name)
            if values[0] != values[1]:
                return name, *values
        return None


@dataclass(frozen=True, kw_only=True)
class Lookback:
    """Settings of `StarConfig`, resolved for a model."""

    lookback: int
    lookback_layers: str

    def __post_init__(self) -> None:
        check_lookback(self.lookback)
        object.__setattr__(self, "lookback_layers", parse_layers(self.lookback_layers))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The settings that a calibration recommends for one model.

    Attributes:
        model: the model.
        settings: for each preset that looks back, how far, and in which layers.
        measured: what it rests on, for readers.
    """

    model: ModelFacts
    settings: dict[str, Lookback]
    measured: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON values of the file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "model": asdict(self.model),
            "settings": {name: asdict(settings) for name, settings in self.settings.items()},
            "measured": self.measured,
        }

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file.

        Raises:
            InvalidInputError: it cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.as_dict(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise InvalidInputError(
                f"the calibration {quote_path(path)} cannot be written ({error.strerror}); choose"
                " another place"
            ) from None

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a file that `star-attention calibrate` wrote.

        Raises:
            InvalidInputError: it cannot be read, or is not a calibration.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise InvalidInputError(
                f"calibration: expected the path of a file, got {type(path).__name__};"
                " `star-attention calibrate` writes the file"
            )
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidInputError(
                f"the calibration {quote_path(path)} cannot be read ({error.strerror});"
                f" give a file of `star-attention calibrate`"
            ) from None
        except ValueError:
            values = None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise InvalidInputError(
                f"{quote_path(path)} is not a calibration; give a file that `star-attention"
                " calibrate` wrote"
            )
        if values.get("version") != VERSION:
            raise InvalidInputError(
                f"the calibration {quote_path(path)} has version {quote(values.get('version'))},"
                f" and this release reads version {VERSION}; {_AGAIN} again"
            )
        try:
            return cls(
                model=ModelFacts(**values["model"]),
                settings={name: Lookback(**values["settings"][name]) for name in HALF_LOOKS_BACK},
                measured=values.get("measured", {}),
            )
        except (KeyError, TypeError, InvalidInputError) as error:
            raise InvalidInputError(
                f"the calibration {quote_path(path)} is damaged ({error}); {_AGAIN} again"
            ) from None

    def under(self, settings: Mapping[str, Any], lookback: int = 0) -> dict[str, Any]:
        """Return settings of `StarConfig`, completed by the calibration's look-back.

        Args:
            settings: those that were given, which go before the calibration's; `quality` among
                them chooses which of the calibration's are meant.
            lookback: the look-back of all settings, those of a `StarConfig` included.

        Raises:
            InvalidInputError: a `StarConfig` looks back otherwise, and no setting says what counts.
        """
        if lookback and all(settings.get(name) is None for name in LOOKBACK_SETTINGS):
            raise InvalidInputError(
                f"lookback {lookback} in config, and a calibration, which has its own; leave one of"
                f" both out, or give {', '.join(LOOKBACK_SETTINGS)} as keywords beside the"
                " calibration"
            )
        quality = settings.get("quality") or BALANCED
        if quality not in HALF_LOOKS_BACK:
            return dict(settings)
        given = {name: value for name, value in settings.items() if name != "quality"}
        return asdict(self.settings[quality]) | given

    def check(self, model: ModelFacts) -> None:
        """Check that the calibration is of this model.

        Raises:
            InvalidInputError: it is of another; names the first field that differs.
        """
        difference = self.model.difference(model)
        if difference is not None:
            name, own, other = difference
            raise InvalidInputError(
                f"the calibration is of another model: it differs in {name}: {own} in the"
                f" calibration, {other} in this model; {_AGAIN}"
            )
