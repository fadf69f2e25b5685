"""Checkpoints on a node's own disk: fast and often, good for a resume on the same nodes in the same layout.

Every rank keeps a sealed folder of its own, `step_00000110/rank_00003/`, with all that it needs to go on, and nobody
needs another node's. A step counts when every rank has its part of one and the same save.
"""

import contextlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from igla_mega.checkpoint import integrity
from igla_mega.checkpoint.integrity import PLACE
from igla_mega.config import json_text
from igla_mega.config.errors import ConfigError
from igla_mega.distributed.mesh import Mesh


def is_local(path: Path) -> bool:
    """Whether a checkpoint is one rank's own."""
    return (path / PLACE).is_file()


def folder_of(pattern: str, run: str) -> Path:
    """The folder of a run on this node.

    Args:
        pattern: `{node}` is the node's number, `{host}` its name; environment variables count.
        run: what keeps runs apart.

    Raises:
        ConfigError: a variable is not set here.
    """
    node = next((os.environ[name] for name in ("GROUP_RANK", "SLURM_NODEID", "NODE_RANK") if name in os.environ), "0")
    folder = os.path.expandvars(pattern.replace("{node}", node).replace("{host}", socket.gethostname()))
    if unset := re.search(r"\$\w+|\$\{\w+\}", folder):
        raise ConfigError(
            f"checkpoint.local_folder: {pattern}: {unset[0]} is not set on {socket.gethostname()}.\n"
            "  Set it for every rank, or write the folder out."
        )
    return Path(folder).expanduser() / run


@dataclass(frozen=True)
class Local:
    """Where this rank keeps its own."""

    root: Path
    """Of this run on this node."""
    mesh: Mesh
    group: dist.ProcessGroup
    """Gloo, of all ranks."""
    layout: str
    """What must be the same for a resume, beside the sizes of the mesh: how state is cut among the ranks."""
    keep_last: int = 1

    def folder(self, step: int) -> Path:
        """What this rank keeps of a step."""
        return integrity.step_dir(self.root, step) / f"rank_{self.mesh.rank:05d}"

    def steps(self) -> list[int]:
        """Steps of which this rank has its part, ascending."""
        if not self.root.is_dir():
            return []
        steps = (integrity.step_of(folder.name) for folder in self.root.iterdir())
        return sorted(s for s in steps if s is not None and (self.folder(s) / integrity.MANIFEST).is_file())

    def place(self, save: str) -> str:
        """What PLACE says; `save` names the save, the same on every rank."""
        mesh = self.mesh
        axes = (mesh.tensor, mesh.pipeline, mesh.context, mesh.data, mesh.expert, mesh.expert_tensor)
        return json.dumps(
            {
                "save": save,
                "rank": mesh.rank,
                "world_size": mesh.world_size,
                "axes": [axis.size for axis in axes],
                "layout": self.layout,
            }
        )

    def agreed(self, say: Callable[[str], None]) -> list[int]:
        """Steps of which every rank has its part, of one save in this layout, descending. Digests are not checked."""
        own: dict[int, str] = {}
        for step in self.steps():
            try:
                content = json_text.loads((self.folder(step) / PLACE).read_bytes())
                if json_text.loads(self.place(content["save"])) == content:
                    own[step] = content["save"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
        parts = self.gathered(own)
        everywhere = [step for step in parts[0] if all(part.get(step) == parts[0][step] for part in parts)]
        newest = max((step for part in parts for step in part), default=None)
        if newest is not None and newest not in everywhere:
            lacking = [rank for rank, part in enumerate(parts) if part.get(newest) != _usual(parts, newest)]
            say(
                f"{self.root}: step {newest} is not whole on all nodes (rank {', '.join(map(str, lacking[:8]))} has no "
                "part of it): another checkpoint is taken"
            )
        return sorted(everywhere, reverse=True)

    def damaged(self, step: int) -> str | None:
        """What is wrong with any rank's part of a step, or None; all ranks call it."""
        reasons = [reason for reason in self.gathered(integrity.damage(self.folder(step))) if reason is not None]
        return reasons[0] if reasons else None

    def gathered(self, own) -> list:
        """Every rank's."""
        everyones: list = [None] * self.mesh.world_size
        dist.all_gather_object(everyones, own, group=self.group)
        return everyones

    def remove(self, steps: list[int]) -> None:
        """Remove this rank's part of some steps."""
        for step in steps:
            with contextlib.suppress(OSError):  # not there, or gone with its disk
                integrity.remove(self.folder(step))
            with contextlib.suppress(OSError):  # other ranks' parts are there yet
                integrity.step_dir(self.root, step).rmdir()

    def tidy(self) -> None:
        """Remove what this rank was killed in the middle of."""
        for begun in (integrity.UNFINISHED, integrity.REMOVED):
            for folder in self.root.glob(f"step_*/{begun}rank_{self.mesh.rank:05d}"):
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()


def _usual(parts: list[dict[int, str]], step: int) -> str:
    saves = [part[step] for part in parts if step in part]
    return max(saves, key=saves.count)
