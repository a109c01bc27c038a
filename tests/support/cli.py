"""The command in this process: its result, and the document that it prints."""

from __future__ import annotations

import json
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from isthmus_tools.cli import app


def isthmus(*arguments: object) -> Result:
    """Run `isthmus` with these arguments."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def document(result: Result) -> Any:
    """The JSON document of a command that succeeded."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(result: Result) -> Any:
    """The JSON document of a command that failed, asked with --json."""
    assert result.exit_code == 1, result.output
    return json.loads(result.stderr)
