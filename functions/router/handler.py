import os

from flask import Flask

from isthmus.serving import create_router_app
from isthmus.settings import RouterSettings

apps: list[Flask] = []


def create_app() -> Flask:
    apps.append(create_router_app(RouterSettings.from_env(os.environ)))
    return apps[-1]


def drain() -> None:
    for app in apps:
        app.extensions["isthmus"].drain()
