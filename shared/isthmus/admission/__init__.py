"""Admission control: requests are worked on, wait or are refused; and bounds on memory.

Source: docs/explanation/routing.md, "Overload".
"""

from isthmus.admission.limit import AdaptiveLimit
from isthmus.admission.memory import RETRY_AFTER_S, MemoryBudget, Reservation, Turns
from isthmus.admission.queue import FairQueue, Waiter
from isthmus.admission.request import current_deadline, describe_varying_work, describe_work, slot_released
from isthmus.admission.slots import MAX_WAITING, Bound, Slots

__all__ = [
    "MAX_WAITING",
    "RETRY_AFTER_S",
    "AdaptiveLimit",
    "Bound",
    "FairQueue",
    "MemoryBudget",
    "Reservation",
    "Slots",
    "Turns",
    "Waiter",
    "current_deadline",
    "describe_varying_work",
    "describe_work",
    "slot_released",
]
