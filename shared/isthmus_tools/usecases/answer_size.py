"""The generation that a language model is planned for: its sizes, checked against the model, and a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.plan import GenerationLoad
from isthmus.errors import ConstraintMalformed, ModelError, RequestMalformed
from isthmus.generation import TextCodec
from isthmus.generation.session import CHUNK
from isthmus.registry import Registry
from isthmus_tools.planner.decoder_layers import DecoderLayers

# A question with some context, and a paragraph in return.
_PROMPT, _TOKENS = 512, 128
# Of a context with less room, the share of the prompt.
_PROMPT_SHARE = 0.75
_MAX_TEXT_BYTES = 2**22
_TEXT = (
    "A river pilot once told me that charts age faster than boats. Every spring the water moves a few thousand tons of"
    " sand, and the channel that was safe in autumn ends on a bar. So the pilots meet in March, before the season, and"
    " go down the river in a small launch with a lead line and a notebook. They write the depth at each bend, the"
    " colour of the water, the trees that have fallen, and where the current sets across the old course. In the evening"
    " they compare: two of them seldom agree, and the figure that goes into the book is the smaller one. What about the"
    " instruments? They have had an echo sounder since 1962, and it is right nine times of ten. The tenth time it shows"
    " the top of a cloud of mud, or a shoal of bream, and nobody wants to find out which with eleven hundred tonnes of"
    " gravel behind him. A measurement, the oldest said, is a question to the river; you have to know how she answers."
    " The book costs four days a year. It has no author, only dates and initials, and it is copied by hand, since a"
    " copy made by hand has been read at least once. "
)


@dataclass(frozen=True)
class AnswerSize:
    """The generation that a language model is planned for; None is the planner's default.

    Units: tokens of the prompt, of the answer, and of the longest session; `sessions` have their state kept at once.
    """

    prompt: int | None = None
    tokens: int | None = None
    context: int | None = None
    sessions: int | None = None

    @property
    def is_default(self) -> bool:
        """Whether nothing was asked for."""
        return self == AnswerSize()

    def load(self, bundle: Bundle) -> GenerationLoad:
        """The sizes for a language model, prompts run in the router's steps.

        Raises:
            ModelError: the bundle is none.
            ConstraintMalformed: a size is not positive, or does not fit the context.
        """
        model_context = DecoderLayers.of(bundle).context
        for name in ("prompt", "tokens", "context", "sessions"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                raise ConstraintMalformed(f"--{name} is {value}; it is 1 or more", what=name)
        if self.context is not None and self.context > model_context:
            raise ConstraintMalformed(
                f"--context is {self.context} tokens, and the model's own is {model_context}", what="context"
            )
        # Defaults shrink to a small context; sizes asked for do not.
        room = self.context or model_context
        tokens = self.tokens or min(_TOKENS, max(1, room - (self.prompt or round(_PROMPT_SHARE * room))))
        prompt = self.prompt or min(_PROMPT, max(1, room - tokens))
        if prompt + tokens > room:
            whose = "--context" if self.context is not None else "the model's context"
            raise ConstraintMalformed(
                f"a prompt of {prompt} and an answer of {tokens} tokens are more than {whose}, {room}", what="prompt"
            )
        return GenerationLoad(prompt, tokens, self.context or prompt + tokens, self.sessions or 1, CHUNK)


def prompt_ids(registry: Registry, bundle: Bundle, texts: Sequence[Path], count: int) -> list[int]:
    """Token ids of the texts' files, or of a text of its own, as often as `count` tokens take.

    Raises:
        RequestMalformed: a file cannot be read, is no text, or gives no token.
        ModelError: the bundle's tokenizer cannot be read.
    """
    if bundle.text is None:
        raise ModelError(f"{bundle.name} is no language model: it has no tokenizer")
    codec = TextCodec(registry.blob(bundle.text.tokenizer), bundle.text)
    # Times do not depend on the text; the share of changed tokens does.
    ids = codec.encode("\n".join(map(_read, texts)) if texts else _TEXT)
    if not ids:
        raise RequestMalformed(f"{texts[0] if texts else bundle.name} gives no token to run the model on")
    return (ids * -(-count // len(ids)))[:count]


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _MAX_TEXT_BYTES:
            raise RequestMalformed(f"{path} has more than {_MAX_TEXT_BYTES} bytes of text", path=str(path))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        reason = getattr(e, "strerror", None) or "it is not UTF-8"
        raise RequestMalformed(f"{path} cannot be read as text: {reason}", path=str(path)) from e
