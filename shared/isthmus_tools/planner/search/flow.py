"""Minimum cuts by SciPy's maximum flow, in 64-bit integers. The only place that imports it.

SciPy counts in 32 bits and wraps in silence beyond, so the capacities are taken from their high bits to their low ones:
a flow that is maximal in units of 2^s leaves less than one unit on each arc of some cut, which bounds what the next,
finer round can still push. Each round fits 32 bits, and the last one, in units of 1, makes the flow exactly maximal.
Source: Ahuja, Magnanti, Orlin, Network Flows, section 7.3 (capacity scaling).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from isthmus.errors import PlanError

Ints = npt.NDArray[np.int64]
_BITS = 30
# An arc and its way back together must not exceed 32 bits either.
_MOST = 2**_BITS - 1


def source_side(
    vertices: int, tails: Ints, heads: Ints, capacities: Ints, source: int, sink: int
) -> npt.NDArray[np.bool_]:
    """Which vertices lie on the source's side of the minimum cut that has the fewest there: reached by spare capacity.

    Units: capacities are whole, not negative, and those out of the source sum to less than 2^62.

    Raises:
        PlanError: the flow found is not as large as the cut, so neither is proved; never seen.
    """
    # Here, so that a function that only reads plans needs no SciPy.
    from scipy.sparse import csr_array  # type: ignore[import-untyped]
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow  # type: ignore[import-untyped]

    # Arcs with the same ends become one, and each gets its way back, so that one array holds what is spare.
    both = csr_array(
        (
            np.concatenate([capacities, 0 * capacities]),
            (np.concatenate([tails, heads]), np.concatenate([heads, tails])),
        ),
        shape=(vertices, vertices),
    )
    both.sum_duplicates()
    spare = both.data
    most = int(capacities[tails == source].sum())
    step = _BITS - len(spare).bit_length()
    shift = max(0, most.bit_length() - _BITS)
    pushed = 0
    while True:
        units = np.minimum(spare >> shift, _MOST).astype(np.int32)
        graph = csr_array((units, both.indices, both.indptr), shape=both.shape)
        flow = maximum_flow(graph, source, sink)
        spare -= flow.flow.data.astype(np.int64) << shift
        pushed += int(flow.flow_value) << shift
        if shift == 0:
            break
        shift = max(0, shift - step)
    left = csr_array((spare, both.indices, both.indptr), shape=both.shape)
    left.eliminate_zeros()
    found = np.zeros(vertices, np.bool_)
    found[breadth_first_order(left, source, return_predecessors=False)] = True
    if (cut := int(capacities[found[tails] & ~found[heads]].sum())) != pushed:
        raise PlanError(f"a flow of {pushed} and a cut of {cut} do not prove each other", flow=pushed, cut=cut)
    return found
