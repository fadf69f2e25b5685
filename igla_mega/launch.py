"""Start the ranks of this machine by torchrun."""

import logging
import os
import signal
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


def torchrun(nproc: int) -> int:
    """Start this same command as `nproc` ranks on this machine and return their exit code."""
    # What went wrong is said by the rank; torchrun's own account of it is a page of traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="igla-mega",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "igla_mega", *sys.argv[1:])
    except ChildFailedError as error:
        # Peers that lose the first one end with errors of their own.
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            hint = " (SIGKILL is also how a machine without memory left ends a process)" if name == "SIGKILL" else ""
            print(f"error: rank {rank} was ended by {name}{hint}; the same command resumes", file=sys.stderr)
        return 2 if failure.exitcode == 2 else 1
    except SignalException as stopped:
        return 128 + stopped.sigval
    return 0
