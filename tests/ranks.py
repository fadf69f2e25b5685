"""Run a function on n gloo ranks, cheaply: importing megatron.core costs seconds, so one server imports and forks.

The server never computes anything itself, so no thread pool is lost in the fork; each rank has one thread.
"""

import faulthandler
import multiprocessing as mp
import os
import sys
import tempfile
import traceback
from collections.abc import Callable

os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of the server: megatron.core's on import
_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["igla_mega.run"])


class RankFailed(AssertionError):
    """A rank raised; the message holds its traceback."""


def run(num_ranks: int, function: Callable, *args, limit_seconds: float = 60.0) -> list:
    """Call `function(*args)` on every rank of a fresh gloo world and return the results by rank.

    Args:
        function: at module level, so that it can be named to the ranks.
        limit_seconds: when it passes, every rank prints its stack and ends.
    """
    with tempfile.TemporaryDirectory(prefix="igla-ranks-") as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            ours, theirs = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank_main, args=(rank, num_ranks, folder, limit_seconds, theirs, function, args)
            )
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        outcomes = []
        for pipe, process in zip(pipes, processes, strict=True):
            try:
                outcomes.append(pipe.recv() if pipe.poll(limit_seconds + 30) else (False, "gave no answer"))
            except EOFError:
                process.join()
                outcomes.append((False, f"ended with {process.exitcode} and no answer"))
        for process in processes:
            process.join(5)
            process.kill()
        failures = [f"rank {rank}: {outcome[1]}" for rank, outcome in enumerate(outcomes) if not outcome[0]]
        if failures:
            raise RankFailed("\n".join(failures))
        return [outcome[1] for outcome in outcomes]


def _rank_main(rank, num_ranks, folder, limit_seconds, pipe, function, args):
    faulthandler.dump_traceback_later(limit_seconds, exit=True, file=sys.__stderr__)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank))
    import torch
    import torch.distributed as dist

    from igla_mega.distributed import host
    from igla_mega.distributed.mesh import destroy_process_groups

    torch.set_num_threads(1)
    host.prepare()
    dist.init_process_group(
        "gloo", store=dist.FileStore(os.path.join(folder, "store"), num_ranks), rank=rank, world_size=num_ranks
    )
    try:
        result = (True, function(*args))
    except BaseException:
        result = (False, traceback.format_exc())
    pipe.send(result)
    if result[0]:
        destroy_process_groups()
    os._exit(0)  # peers of a failed rank would wait in their destructors
