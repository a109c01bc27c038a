"""Fixtures of tests of use cases."""

from support.published_decoders import smollm2 as smollm2
from support.published_decoders import tiny_decoder as tiny_decoder
