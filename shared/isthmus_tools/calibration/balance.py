"""Steps of several tensors that cross one cut: the same quality is to mean the same harm in each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from isthmus.codecs.rows import RowTable
from isthmus.codecs.steps import FACTOR, THIRD
from isthmus.codecs.table import Table
from isthmus_tools.calibration.sensitivity import Sensitivity

Tables: TypeAlias = dict[str, Table | RowTable]

_MOST = 40
"""How far steps are moved, in thirteenths of a factor of three."""


def balance(tables: Tables, sensitivities: Mapping[str, Sensitivity]) -> None:
    """Move the steps of those tables that `sensitivities` are of, so that a step does the same harm in each.

    A table's unit is its tensor's own root mean square; how much noise of one unit harms the answer differs. On average
    over their channels steps stay where they are.
    """
    harms = {
        name: THIRD * math.log(tables[name].scale * math.sqrt(harm), FACTOR)
        for name, how in sensitivities.items()
        if name in tables and (harm := float(np.trace(how.channels)) / len(how.channels)) > 0
    }
    if len(harms) < 2:
        return
    mean = float(np.average(list(harms.values()), weights=[tables[name].channels for name in harms]))
    for name, harm in harms.items():
        by = round(min(max(mean - harm, -_MOST), _MOST))
        coarsest, finest = tables[name].steps
        tables[name] = replace(tables[name], steps=(coarsest + by, finest + by))
