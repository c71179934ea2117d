"""Asking the hub once, without retries, if a model can be had. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from star_attention.errors import ModelNotFoundError, first_line

ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TIMEOUT_S = 3.0


def check(path: str, file: str, location: dict[str, Any], kind: str = "model") -> Path | None:
    """Check that the hub answers, or that a hub id is in its cache.

    Without a network, transformers asks six times for each file, which takes half a minute.

    Args:
        path: hub id.
        file: a file that it must have.
        location: arguments of `from_pretrained` (revision, subfolder, cache_dir, token, ...).
        kind: what to call it in an error.

    Returns:
        None if the hub answers; otherwise the folder in the cache.

    Raises:
        ModelNotFoundError: it is not in the cache, and the hub is out of reach.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    subfolder = location.get("subfolder") or ""
    name = f"{subfolder}/{file}" if subfolder else file
    revision = location.get("revision")
    problem = f"there is no folder {path} here, and it could not be loaded as a hub id: "
    try:
        cached = try_to_load_from_cache(
            path, name, cache_dir=location.get("cache_dir"), revision=revision
        )
        if constants.HF_HUB_OFFLINE or location.get("local_files_only"):
            reason = "it is not in the hub's cache, and the hub is switched off (HF_HUB_OFFLINE)"
        else:
            token = location.get("token")
            get_hf_file_metadata(
                hf_hub_url(path, name, revision=revision), token=token, timeout=_TIMEOUT_S
            )
            return None
    except RepositoryNotFoundError:
        # One that is private or gated, too.
        raise ModelNotFoundError(
            f"{problem}the hub has no such {kind}, or you have no access to it; check the path or"
            " the id, or log in with `hf auth login`"
        ) from None
    except HfHubHTTPError:
        # The hub answers; transformers says what it answers.
        return None
    except Exception as error:
        # An id that cannot be one, or an error of the HTTP client, which differs between releases.
        reason = f"the hub is out of reach ({first_line(error)})"
        if isinstance(error, ValueError):
            raise ModelNotFoundError(
                f"{problem}{first_line(error).rstrip('.')}; check the path or the id"
            ) from error
    if isinstance(cached, str):
        return Path(cached).parents[len(Path(name).parts) - 1]
    raise ModelNotFoundError(
        f"{problem}{reason}; check the path or the id, or download the {kind} where there is a"
        " network"
    )
