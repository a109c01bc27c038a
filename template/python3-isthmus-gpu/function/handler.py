"""A function: `create_app` returns the WSGI app that index.py serves. Your handler folder replaces this file."""

from flask import Flask, Response, request


def create_app() -> Flask:
    """An app that answers POST / with what it was sent, and GET /ready when it can."""
    app = Flask(__name__)

    @app.post("/")
    def echo() -> Response:
        return Response(request.get_data(), mimetype="application/octet-stream")

    @app.get("/ready")
    def ready() -> Response:
        return Response(status=200)

    return app
