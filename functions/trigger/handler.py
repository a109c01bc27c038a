import os
from pathlib import Path

from flask import Flask

from isthmus.serving import create_trigger_app
from isthmus.settings import TriggerSettings

apps: list[Flask] = []


def create_app() -> Flask:
    app = create_trigger_app(TriggerSettings.from_env(os.environ), Path(__file__).parent)
    apps.append(app)
    return app


def drain() -> None:
    for app in apps:
        app.extensions["isthmus"].drain()
