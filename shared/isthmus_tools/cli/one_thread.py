"""Imported before numpy is: its products take one thread.

Those that codecs make are small, and on a busy machine two threads that wait for each other take three to ten times as
long as one. Models run on the runtime's own threads. Who wants more sets OPENBLAS_NUM_THREADS.
"""

from __future__ import annotations

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
