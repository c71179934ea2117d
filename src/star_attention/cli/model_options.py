"""The options that say which model a command runs, and how.

Their help texts end up in docs/cli.md, beside those of `options.py`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Annotated, Any

from star_attention.cli.config_options import ConfigOptions
from star_attention.cli.options import option, without_none
from star_attention.config import STALL_S
from star_attention.errors import InvalidInputError, quote

MODEL_VARIABLE = "STAR_ATTENTION_MODEL"
"""Environment variable with the default of --model."""


def _model(**more: Any) -> Any:
    return option(
        "Model folder, GGUF file, folder of an adapter, or hub id.",
        "--model",
        "-m",
        panel="Model",
        metavar="MODEL",
        envvar=MODEL_VARIABLE,
        **more,
    )


Model = Annotated[str, _model()]
Dtype = Annotated[
    str,
    option(
        "Precision: auto (the checkpoint's), float32, bfloat16 or float16.",
        panel="Model",
        metavar="TYPE",
    ),
]
Weights = Annotated[
    str | None,
    option(
        "fp8: the linear layers in fp8, except those of the first and the last decoder layer:"
        " about half of the bytes, and faster on GPUs that multiply fp8. A saved context remembers"
        " it.",
        "--weights",
        panel="Model",
        metavar="TYPE",
        show_default="as in the files",
    ),
]
RopeScaling = Annotated[
    str | None,
    option(
        "Rotary scaling in place of the config's, to extend the context: TYPE:FACTOR, like yarn:4"
        " (yarn:4:32768 with the original length), or a JSON object. Saved contexts need it again.",
        "--rope-scaling",
        panel="Model",
        metavar="SCALING",
    ),
]
Device = Annotated[
    str,
    option(
        "auto (a GPU if there is one), cpu, cuda or cuda:1.",
        # Explicit: typer 0.27 derives the name from a metavar that differs in case only.
        "--device",
        panel="Model",
        metavar="DEVICE",
    ),
]
TensorParallel = Annotated[
    int,
    option(
        "Number of ranks that share the weights and attention heads, for models too large for one"
        " device.",
        "--tensor-parallel",
        panel="Ranks",
        metavar="N",
        min=1,
    ),
]


@dataclass(frozen=True, kw_only=True)
class LocationOptions:
    """Where in a folder or repository a model is, and whether its own code may run."""

    subfolder: Annotated[
        str | None,
        option("Folder inside MODEL that holds the model.", panel="Model", metavar="NAME"),
    ] = None
    revision: Annotated[
        str | None,
        option("Branch, tag or commit of a hub id.", panel="Model", metavar="NAME"),
    ] = None
    trust_remote_code: Annotated[
        bool,
        option(
            "Run the code that comes with the model. Read it first.",
            "--trust-remote-code",
            panel="Model",
        ),
    ] = False

    def kwargs(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`."""
        kwargs = without_none(subfolder=self.subfolder, revision=self.revision)
        return kwargs | ({"trust_remote_code": True} if self.trust_remote_code else {})


@dataclass(frozen=True, kw_only=True)
class ShapeOptions:
    """A model of which only the config is read."""

    model: Model
    location: LocationOptions = field(default_factory=LocationOptions)
    dtype: Dtype = "auto"
    weights: Weights = None
    rope_scaling: RopeScaling = None


def check_path(shape: ShapeOptions) -> None:
    """Check, before torch is imported, that there is a model that can run.

    Raises:
        ModelNotFoundError: If there is none.
        UnsupportedModelError: If its files say that it cannot run.
        InvalidInputError: If --rope-scaling or --weights cannot be.
    """
    from star_attention.hf.loading import checks, files, rope_words

    rope_words.take({"rope_scaling": shape.rope_scaling})
    model = files.locate(shape.model, shape.location.kwargs())
    checks.check_config(model)
    checks.check_can_quantize(model, {}, shape.weights)


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model and how it runs. settings: those of `StarConfig` that concern the model."""

    model: Model
    adapter: Annotated[
        str | None,
        option(
            "Folder or hub id of a PEFT adapter to load around the model.",
            panel="Model",
            metavar="PATH",
        ),
    ] = None
    location: LocationOptions = field(default_factory=LocationOptions)
    model_kwargs: Annotated[
        str | None,
        option(
            "Arguments of transformers' from_pretrained, as a JSON object.",
            panel="Model",
            metavar="JSON",
        ),
    ] = None
    dtype: Dtype = "auto"
    weights: Weights = None
    rope_scaling: RopeScaling = None
    device: Device = "auto"
    compile: Annotated[
        bool | None,
        option(
            "Compile layers and use CUDA graphs: faster, after a delay at first use.",
            "--compile/--no-compile",
            panel="Model",
            show_default="on a GPU with Triton installed",
        ),
    ] = None
    settings: Annotated[
        dict[str, Any], ConfigOptions("tokens_per_forward", "reserve_tokens", "slice_weights")
    ] = field(default_factory=dict)
    tensor_parallel: TensorParallel = 1
    stall_limit: Annotated[
        float,
        option(
            "Seconds without a heartbeat before a rank is considered dead. Long blocks do not"
            " trigger it.",
            "--stall-limit",
            panel="Ranks",
            metavar="X",
            min=1.0,
        ),
    ] = STALL_S

    def kwargs(self) -> dict[str, Any]:
        """Return the `model_kwargs` of `StarLLM.from_pretrained`.

        Raises:
            InvalidInputError: If --model-kwargs is not a JSON object.
        """
        kwargs = json_object(self.model_kwargs, "--model-kwargs") | self.location.kwargs()
        return kwargs | without_none(rope_scaling=self.rope_scaling)


@dataclass(frozen=True, kw_only=True)
class SavedModelOptions(ModelOptions):
    """The model of a saved context, which the file names."""

    model: Annotated[
        str,
        option(
            "The model that encoded the text; by default the one that the file names.",
            "--model",
            "-m",
            panel="Model",
            metavar="MODEL",
            show_default=False,
        ),
    ] = ""


@dataclass(frozen=True, kw_only=True)
class ServedModelOptions(ModelOptions):
    """The model of a server."""

    model: Annotated[str, _model(show_default=False)] = ""
    shapes: Annotated[
        str | None,
        option(
            "Random weights in the shapes of llama-3.1-8b, llama-3.2-1b, smollm2-135m,"
            " deepseek-v2-lite, gemma-3-4b or gemma-3-12b, instead of a model: to measure with.",
            "--shapes",
            panel="Model",
            metavar="NAME",
        ),
    ] = None


def json_object(text: str | None, name: str) -> dict[str, Any]:
    """Return the value of an option that takes a JSON object; {} for None."""
    if text is None:
        return {}
    problem = "it is something else"
    try:
        value = json.loads(text)
    except ValueError as error:
        value, problem = None, str(error)
    if not isinstance(value, dict):
        raise InvalidInputError(
            f"{name} {quote(text)} is not a JSON object ({problem}); write it like"
            ' \'{"device_map": "auto"}\''
        )
    return value
