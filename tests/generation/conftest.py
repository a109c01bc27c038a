"""Fixtures of tests of generation."""

from support.bundles import photos as photos
from support.published_decoders import store as store
from support.published_decoders import tiny_decoder as tiny_decoder
