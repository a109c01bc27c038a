import os

from flask import Flask

from isthmus.serving import create_router_app
from isthmus.settings import RouterSettings


def create_app() -> Flask:
    return create_router_app(RouterSettings.from_env(os.environ))
