"""The modules that the tests stand on: the real models and where their files are, and problems for the planner."""

from __future__ import annotations

import sys

from report import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from support import models, planner_problems

__all__ = ["models", "planner_problems"]
