import os

from flask import Flask

from isthmus.serving import create_segment_app
from isthmus.settings import SegmentSettings

apps: list[Flask] = []


def create_app() -> Flask:
    apps.append(create_segment_app(SegmentSettings.from_env(os.environ)))
    return apps[-1]


def drain() -> None:
    for app in apps:
        app.extensions["isthmus"].drain()
