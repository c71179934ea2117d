"""predictions.jsonl: one answer per line, appended as it comes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from star_attention.errors import InvalidInputError
from star_attention.evals.samples.sample import Sample

PREDICTIONS = "predictions.jsonl"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One line of predictions.jsonl; its key is the sample, the variant and the settings.

    Attributes:
        sample: Id of the sample.
        variant: `Variant.key`.
        settings: Hash of the `settings` in run.json.
        task: Name of the sample's task.
        group: `Sample.group`.
        length: Tokens that the sample is reported under; 0 if unknown.
        sample_sha256: Hash of the whole sample but its length (first 16 digits).
        context_sha256: Hash of its context (first 16 digits).
        prediction: The answer's text.
        answers: Right answers, as the metric reads them.
        metric: Name of the metric.
        score: 0 to 1.
        finish_reason: "stop" or "length", as in `Generation`.
        context_tokens: Tokens of the encoded context.
        query_tokens: Tokens of query and answer prefix.
        answer_tokens: Tokens generated.
        block_size: Tokens per block, as resolved for this context.
        anchor_size: Tokens of the anchor, as resolved for this context.
        blocks: Number of blocks.
        encode_s: Seconds to encode the context.
        sharing: Samples of the run that share this encoding.
        answer_s: Seconds for the whole answer.
        peak_bytes: Peak device memory of the larger phase; None on a CPU.
        meta: `Sample.meta`.
        reasoning: What the model marked as its reasoning, which is not scored; None for none.
        query: Query and answer prefix; None in runs of earlier versions.
        lookback: Blocks before its own that each block saw; 0 in runs of earlier versions.
        lookback_layers: The layers that looked back; None for none.
        second_look: Share of the context computed again for the query; 0 in runs of earlier
            versions.
    """

    sample: str
    variant: str
    settings: str
    task: str
    group: str
    length: int
    sample_sha256: str
    context_sha256: str
    prediction: str
    answers: tuple[str, ...]
    metric: str
    score: float
    finish_reason: str
    context_tokens: int
    query_tokens: int
    answer_tokens: int
    block_size: int
    anchor_size: int
    blocks: int
    encode_s: float
    sharing: int
    answer_s: float
    peak_bytes: int | None
    meta: Mapping[str, Any]
    reasoning: str | None = None
    query: str | None = None
    lookback: int = 0
    lookback_layers: str | None = None
    second_look: float = 0.0

    @property
    def key(self) -> tuple[str, str]:
        """Sample and variant, unique within a run folder."""
        return self.sample, self.variant

    @property
    def question_s(self) -> float:
        """Seconds per question, including its share of the encoding."""
        return self.encode_s / self.sharing + self.answer_s

    @property
    def is_empty(self) -> bool:
        """True if the answer has no text."""
        return not self.prediction.strip()

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=str) + "\n"

    @classmethod
    def from_json(cls, line: bytes) -> Prediction:
        """Parse a line; raises `ValueError` or `TypeError` for a line that is not a prediction."""
        values = json.loads(line)
        names = {field.name for field in fields(cls)}
        # Earlier versions did not write them.
        earlier = {"reasoning": None, "query": None, "lookback": 0, "lookback_layers": None}
        values = earlier | {"second_look": 0.0} | values
        if set(values) != names:
            differing = ", ".join(sorted(set(values) ^ names))
            raise ValueError(f"missing or unknown fields: {differing}")
        prediction = cls(**values | {"answers": tuple(values["answers"])})
        # Raises TypeError if the key is a list or dict.
        hash(prediction.key)
        return prediction


def read_predictions(folder: Path, *, required: bool = True) -> Iterator[Prediction]:
    """Yield the predictions of a run folder, in order.

    A last line without an end was cut off by a kill, and is skipped.

    Args:
        folder: The run folder.
        required: Raise if there are none.

    Raises:
        InvalidInputError: For a damaged line, with its number, and for two predictions of one
            sample and variant.
    """
    path = folder / PREDICTIONS
    line_numbers: dict[tuple[str, str], int] = {}
    for number, line in enumerate(_complete_lines(path), start=1):
        try:
            prediction = Prediction.from_json(line)
        except (ValueError, TypeError) as error:
            raise InvalidInputError(
                f"{path}, line {number:,} is damaged ({error}); remove the line, and run the"
                " command again to redo it"
            ) from None
        if prediction.key in line_numbers:
            raise InvalidInputError(
                f"{path}, line {number:,} repeats line {line_numbers[prediction.key]:,} (sample"
                f" {prediction.sample}, variant {prediction.variant}); remove one of them"
            )
        line_numbers[prediction.key] = number
        yield prediction
    if required and not line_numbers:
        raise InvalidInputError(f"{path} holds no predictions; run `eval` first")


def _complete_lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    return
                yield line
    except FileNotFoundError:
        return


def open_predictions(path: Path) -> IO[bytes]:
    """Open for appending, locked against a second run, without the line that a kill cut off.

    Raises:
        InvalidInputError: If another run is writing to the file.
    """
    file = path.open("ab+")
    try:
        # Windows has no fcntl.
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InvalidInputError(
            f"another run is writing to {path}; wait for it, or give another folder"
        ) from None
    except OSError:
        # Some network file systems have no locks.
        pass
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
    return file


def canonical(value: Any) -> str:
    """Return JSON with sorted keys, for hashing."""
    return json.dumps(value, sort_keys=True, default=str)


def sha256(text: str) -> str:
    """Return the first 16 hexadecimal digits of the hash."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def sample_sha256(sample: Sample) -> str:
    """Return the hash of every field except `length`, which depends on the rest of the data set."""
    return sha256(canonical(sample.as_dict() | {"length": 0}))
