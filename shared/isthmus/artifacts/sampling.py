"""How a token is chosen among scores: the parameters of a step that ends in sampling.

Source: platform.openai.com/docs/api-reference/chat; min_p: Nguyen et al., arXiv 2407.01082; repetition_penalty: Keskar
et al., arXiv 1909.05858.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from isthmus.artifacts.tensors import TensorSpec

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
# Of one step: a chunk of a prompt, or the proposals of speculation.
MAX_STEP_TOKENS = 4096
_Penalty = Annotated[float, Meta(ge=-2, le=2)]


class Sampling(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Parameters of sampling; the defaults choose the token of the highest score.

    `last` is for how many of the step's last positions a token is sampled, 0 for a chunk of a prompt that is not its
    end. `tokens` are the ids of the step, where a penalty needs the history. `logprobs` is the number of alternatives
    to report for each token beside its own.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: _Penalty = 0.0
    frequency_penalty: _Penalty = 0.0
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] = 0
    last: Annotated[int, Meta(ge=0, le=MAX_STEP_TOKENS)] = 1
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] = 0
    tokens: Annotated[tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)], ...], Meta(max_length=MAX_STEP_TOKENS)] = ()

    @property
    def has_penalty(self) -> bool:
        """Whether earlier tokens count."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


TOKENS, LOGPROBS = "tokens", "logprobs"
ALTERNATIVES, ALTERNATIVE_LOGPROBS = "alternatives", "alternative_logprobs"
SAMPLED = (TOKENS, LOGPROBS, ALTERNATIVES, ALTERNATIVE_LOGPROBS)
"""Outputs of a step that samples, in place of the model's."""


def sampled_outputs(sampling: Sampling) -> tuple[TensorSpec, ...]:
    """What a step answers with: ids and log-probabilities of its last positions, and alternatives where asked for."""
    rows = (1, "sampled")
    outputs = (TensorSpec(TOKENS, "int64", rows), TensorSpec(LOGPROBS, "float32", rows))
    if not sampling.logprobs:
        return outputs
    wide = (*rows, sampling.logprobs)
    return (*outputs, TensorSpec(ALTERNATIVES, "int64", wide), TensorSpec(ALTERNATIVE_LOGPROBS, "float32", wide))
