import os

from flask import Flask

from isthmus.serving import create_segment_app
from isthmus.settings import SegmentSettings


def create_app() -> Flask:
    return create_segment_app(SegmentSettings.from_env(os.environ))
