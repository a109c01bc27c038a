import os
from pathlib import Path

from flask import Flask

from isthmus.serving import create_trigger_app
from isthmus.settings import TriggerSettings


def create_app() -> Flask:
    return create_trigger_app(TriggerSettings.from_env(os.environ), Path(__file__).parent)
