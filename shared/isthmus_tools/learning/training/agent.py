"""torch's elastic agent for the workers of a run: `python -m isthmus_tools.learning.training.agent JOB COUNT RESTARTS`.

As torchrun, but that nothing listens: agent and workers meet in files of the run's folder, which no other user reads.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from isthmus.files import write_whole


def main() -> None:
    """Run the workers to their end; the first failure after the last restart goes to a file."""
    path, processes, restarts = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    # By default agents share a TCP store, which listens on every interface.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Redirected: the workers' own lines would mix with the command's, and a failed worker's are looked at alone.
    folder = Path(path).parent
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint=str(folder / "rendezvous"),
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=restarts,
        logs_specs=DefaultLogsSpecs(str(folder / "logs"), redirects=Std.ALL),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "isthmus_tools.learning.training.worker", path)
    except ChildFailedError as e:
        rank, failure = e.get_first_failure()
        facts = {"worker": rank, "process": failure.pid, "exit_code": failure.exitcode, "signal": failure.signal_name()}
        write_whole(folder / "failure.json", json.dumps(facts).encode())
        sys.exit(1)


if __name__ == "__main__":
    main()
