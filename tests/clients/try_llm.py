"""The command `llm` and its library, with a model of its own configuration."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(tempfile.mkdtemp())
# Read when the package is imported.
os.environ["LLM_USER_PATH"] = str(FOLDER)

import llm  # noqa: E402
from trial import DOCUMENT, KEY, MODEL, QUESTION, SECOND, TOO_MANY, URL, run  # noqa: E402

(FOLDER / "extra-openai-models.yaml").write_text(
    f"- model_id: kept\n  model_name: {MODEL}\n  api_base: {URL}/v1\n  api_key_name: star\n"
)
(FOLDER / "keys.json").write_text(f'{{"star": "{KEY}"}}')
model = llm.get_model("kept")


def asked(question: str, *, stream: bool = False) -> dict[str, object]:
    prompt = f"{DOCUMENT}\n{question}"
    response = model.prompt(prompt, stream=stream, max_tokens=24)
    text = response.text()
    details = response.token_details or {}
    return {"text": text, "cached": details.get("prompt_tokens_details", {}).get("cached_tokens")}


def command() -> str:
    line = [sys.executable, "-m", "llm", "-m", "kept", "-o", "max_tokens", "24", "--no-log"]
    done = subprocess.run(
        [*line, "-f", os.environ["STAR_DOCUMENT"], QUESTION],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


run(
    version=lambda: version("llm"),
    chat=lambda: model.prompt(QUESTION, stream=False, max_tokens=24).text(),
    document=lambda: asked(QUESTION),
    second=lambda: asked(SECOND),
    stream=lambda: asked(SECOND, stream=True),
    command=command,
    too_long=lambda: model.prompt(QUESTION, stream=False, max_tokens=TOO_MANY).text(),
    wrong_key=lambda: model.prompt(QUESTION, stream=False, key="wrong").text(),
)
