"""Generation of text by a language model over a cut: prompt, steps, recovery, speculation."""

from isthmus.generation.generator import Generated, GenerationRequest, Generator, Proposer
from isthmus.generation.prompt_lookup import PromptLookup
from isthmus.generation.speculation import AdaptiveProposer
from isthmus.generation.text import TextCodec

__all__ = ["AdaptiveProposer", "Generated", "GenerationRequest", "Generator", "PromptLookup", "Proposer", "TextCodec"]
