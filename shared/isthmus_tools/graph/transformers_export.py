"""Export of an encoder in Hugging Face's folder layout: config.json and safetensors, by transformers and torch.

Only classes of transformers itself are built; code in the folder is not executed, and nothing is downloaded.

Source: huggingface.co/docs/transformers/main_classes/model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from isthmus.arrays import Array
from isthmus.errors import ModelError
from isthmus_tools.graph import torch_export
from isthmus_tools.graph.exporting import FactoryResult, ModelInputs, failures, missing_package, quiet

# Two rows of text are enough to trace; sizes of 1 would be taken for constants.
_TRACED_ROWS, _TRACED_TOKENS = 2, 16
_TEXT_INPUTS = ("input_ids", "attention_mask")
_IMAGE_INPUT = "pixel_values"


def export(model: str, out: Path, inputs: ModelInputs) -> Path:
    """Write the encoder of a folder as ONNX: of text with free rows and tokens, or of images with free rows.

    Inputs are `input_ids` and `attention_mask` (rows, tokens), or `pixel_values` (rows, channels, height, width).

    Raises:
        ModelError: transformers or torch is missing, the folder holds no encoder with safetensors, or the export
            failed.
    """
    try:
        import torch
        import transformers
    except ImportError as e:
        raise missing_package(model, "transformers and torch", "transformers") from e
    with quiet(), failures("transformers", model):
        encoder = _load(model, transformers)
        traced, dims = _inputs(model, encoder)
    wrapped = FactoryResult(model, _wrap(encoder, tuple(traced), torch))
    return torch_export.export_named(wrapped, out, ModelInputs(examples=traced, free=dims))


def _load(model: str, transformers: Any) -> Any:
    # A bar for reading weights would stand between a command's own.
    transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    name = (getattr(config, "architectures", None) or ["none"])[0]
    if getattr(config, "is_encoder_decoder", False) or name.endswith(("ForCausalLM", "LMHeadModel")):
        raise ModelError(
            f"{model} holds a {name}, which generates in steps with a state; encoders are taken, and decoders of the"
            " families Llama, Qwen2 and GPT-2",
            spec=model,
            architecture=name,
        )
    # A name of the configuration is looked up among transformers' own model classes alone.
    cls: Any = getattr(transformers, name, None)
    if not _is_model_class(cls, transformers):
        raise ModelError(f"{model}/config.json names the architecture {name}, which transformers has not", spec=model)
    return cls.from_pretrained(
        model,
        config=config,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        # Plain operators, where a cut may lie between any two.
        attn_implementation="eager",
    ).eval()


def _is_model_class(cls: Any, transformers: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)


def _inputs(model: str, encoder: Any) -> tuple[dict[str, Array], dict[str, dict[int, str]]]:
    """Inputs to trace with, and their free dimensions."""
    if encoder.main_input_name == _TEXT_INPUTS[0]:
        ones = np.ones((_TRACED_ROWS, _TRACED_TOKENS), np.int64)
        return dict.fromkeys(_TEXT_INPUTS, ones), {name: {0: "batch", 1: "tokens"} for name in _TEXT_INPUTS}
    if encoder.main_input_name == _IMAGE_INPUT:
        size = encoder.config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (_TRACED_ROWS, encoder.config.num_channels, height, width)
        return {_IMAGE_INPUT: np.zeros(shape, np.float32)}, {_IMAGE_INPUT: {0: "batch"}}
    raise ModelError(
        f"{model} takes {encoder.main_input_name}; encoders of input_ids or pixel_values are taken",
        spec=model,
        input=encoder.main_input_name,
        hint="give package.module:factory, a function of yours that returns the model",
    )


def _wrap(encoder: Any, names: tuple[str, ...], torch: Any) -> Any:
    """The encoder as a module of these inputs, with its tensors alone as outputs."""

    class TextEncoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask, return_dict=False)

    class ImageEncoder(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, pixel_values: Any) -> Any:
            return self.encoder(pixel_values=pixel_values, return_dict=False)

    return TextEncoder() if names == _TEXT_INPUTS else ImageEncoder()
