"""Settings of a server: what it listens on, whom it lets in, and what it allows."""

from __future__ import annotations

import ipaddress
import math
from dataclasses import dataclass, fields
from typing import Any

from star_attention.errors import InvalidInputError, SizeError, quote
from star_attention.planning.sizes import parse_size

SIZES = (
    "max_body",
    "default_max_tokens",
    "max_tokens",
    "min_context_tokens",
    "max_context_bytes",
    "max_host_bytes",
    "max_store_bytes",
)
"""Settings that may be written as 64k, 1m or 8g."""
_MAY_BE_ZERO = (
    "port",
    "drain_timeout",
    "min_context_tokens",
    "max_conversations",
    "max_host_bytes",
    "max_responses",
)


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What can be set of a server. Sizes may be given as text: 64k, 1m, 8g (powers of 1024).

    Attributes:
        host, port: what to listen on. Another host than this machine needs `keys`.
        keys: file with one key per line, as `name:key` or `name:sha256:HEX`; None lets in everybody
            who reaches a loopback address.
        insecure: True to listen on other addresses without keys.
        allowed_hosts: names in a `Host` header that are served without keys, beside this machine's.
        public_metrics: True to show `/metrics` without a key.
        served_model_name: the model's name in requests and answers; None for the name of its
            folder.
        log_json: True to log a JSON object a line.
        warm_up: False to compile and capture when that is first needed, instead of at the start.
        max_rows: most answers that are generated at once.
        max_rows_per_key: most answers of one key that are generated at once; None for no limit.
        max_waiting: most requests that wait or run at once; more are refused with 429.
        max_body: most bytes of a request's body.
        default_max_tokens: most tokens of an answer for which a request gives no limit.
        max_tokens: most tokens that a request may ask for; None for all that fit.
        max_answers: most answers to one request (`n`, or prompts times `n`).
        max_responses: most responses of a key that are kept, so that they can be continued; 0 for
            none.
        max_stops: most stop strings of a request.
        request_timeout: seconds from a request to its last token; None for no limit.
        drain_timeout: seconds that running answers get at the end.
        keepalive: seconds of silence after which a stream gets a comment.
        heartbeat: seconds of silence after which a stream gets a chunk without text.
        engine_stall: seconds without a step after which `/health` says that the server hangs.
        min_context_tokens: tokens of a prompt from which on a part of it is kept without a mark.
        implicit: False to keep only what a request marks or names.
        store: folder for contexts that survive a restart; None for memory only.
        max_context_bytes: most bytes of contexts in memory; None for half of what is free.
        max_host_bytes: most bytes of contexts in host memory that have left a GPU's; None for a
            quarter of what is free, 0 for none.
        max_store_bytes: most bytes of contexts in the folder.
        context_ttl: seconds without use after which a context is dropped; None for no limit.
        max_conversations: most conversations whose next prompt computes only what is new; 0 for
            none.
        conversation_ttl: seconds without use after which a conversation is dropped.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: str | None = None
    insecure: bool = False
    allowed_hosts: tuple[str, ...] = ()
    public_metrics: bool = False
    served_model_name: str | None = None
    log_json: bool = False
    warm_up: bool = True
    max_rows: int = 64
    max_rows_per_key: int | None = None
    max_waiting: int = 256
    max_body: int = 64 * 2**20
    default_max_tokens: int = 1024
    max_tokens: int | None = None
    max_answers: int = 16
    max_responses: int = 1000
    max_stops: int = 16
    request_timeout: float | None = None
    drain_timeout: float = 30.0
    keepalive: float = 10.0
    heartbeat: float = 30.0
    engine_stall: float = 300.0
    min_context_tokens: int = 1024
    implicit: bool = True
    store: str | None = None
    max_context_bytes: int | None = None
    max_host_bytes: int | None = None
    max_store_bytes: int = 64 * 2**30
    context_ttl: float | None = None
    max_conversations: int = 256
    conversation_ttl: float = 1800.0

    @classmethod
    def of(cls, **values: Any) -> ServeSettings:
        """Return settings from values as a command line or a file has them.

        Raises:
            InvalidInputError: a value that cannot work.
        """
        values = {name: value for name, value in values.items() if value is not None}
        for name in SIZES:
            if name in values:
                values[name] = _size(values[name], name)
        if isinstance(values.get("allowed_hosts"), (list, str)):
            hosts = values["allowed_hosts"]
            values["allowed_hosts"] = (hosts,) if isinstance(hosts, str) else tuple(hosts)
        return cls(**values)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if "float" in str(field.type):
                _check_seconds(field.name, value, has_default=field.default is not None)
                continue
            least = 0 if field.name in _MAY_BE_ZERO else 1
            if value < least:
                raise InvalidInputError(f"{field.name}: expected {least} or more, got {value}")
        if self.port > 65535:
            raise InvalidInputError(f"port: expected 0 to 65535, got {self.port}")
        if self.keys is None and not self.insecure and not is_loopback(self.host):
            raise InvalidInputError(
                f"host {quote(self.host)} can be reached from other machines, and without keys"
                " anybody may use the model; give a key file (--keys), listen on 127.0.0.1, or"
                " serve everybody with --insecure"
            )


def _check_seconds(name: str, value: float, *, has_default: bool) -> None:
    """Raise `InvalidInputError` for a time that is none, or that would stop everything."""
    may_be_zero = name in _MAY_BE_ZERO
    if math.isfinite(value) and (value > 0 or (value == 0 and may_be_zero)):
        return
    wanted = "0 or more" if may_be_zero else "above 0"
    unlimited = "" if has_default else "; leave it out for no limit"
    raise InvalidInputError(
        f"{name}: expected a number of seconds {wanted}, got {value:g}{unlimited}"
    )


def _size(value: Any, name: str) -> int:
    try:
        return parse_size(value, name)
    except SizeError:
        raise InvalidInputError(
            f"{name} {quote(value)} is not a size; write 4096, '64k', '64m' or '8g'"
        ) from None


def is_loopback(host: str) -> bool:
    """True for an address or a name of this machine that no other machine reaches."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
