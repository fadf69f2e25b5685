"""Keep checkpoints on the nodes' own disks: fast enough to save often, for a resume on the same nodes and layout.

Every rank writes a sealed folder, `step_00000110/rank_00003/`, with everything that it needs to resume, so that no rank
reads another node's disk. A step is usable if every rank has its part of the same save.
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
    """Return True if a folder is one rank's part of a local checkpoint."""
    return (path / PLACE).is_file()


def folder_of(pattern: str, run: str) -> Path:
    """Return the folder of a run's local checkpoints on this node.

    Args:
        pattern: path in which `{node}` stands for the node's number and `{host}` for its name; environment variables
            are expanded.
        run: name of the run's subfolder.

    Raises:
        ConfigError: an environment variable is not set on this node.
    """
    node = next((os.environ[name] for name in ("GROUP_RANK", "SLURM_NODEID", "NODE_RANK") if name in os.environ), "0")
    folder = os.path.expandvars(pattern.replace("{node}", node).replace("{host}", socket.gethostname()))
    if unset := re.search(r"\$\w+|\$\{\w+\}", folder):
        raise ConfigError(
            f"checkpoint.local_folder: {pattern}: {unset[0]} is not set on {socket.gethostname()}.\n"
            "  Set it for every rank, or give the folder without a variable."
        )
    return Path(folder).expanduser() / run


@dataclass(frozen=True)
class Local:
    """The local checkpoints of a run, as one rank sees them."""

    root: Path
    """Folder of this run on this node."""
    mesh: Mesh
    group: dist.ProcessGroup
    """Gloo group of all ranks."""
    layout: str
    """Description of how state is divided among the ranks. A resume needs the same one, and the same mesh."""
    keep_last: int = 1
    """Number of newest steps to keep."""

    def folder(self, step: int) -> Path:
        """Return the folder of this rank's part of a step."""
        return integrity.step_dir(self.root, step) / f"rank_{self.mesh.rank:05d}"

    def steps(self) -> list[int]:
        """Return the steps of which this rank has its part, ascending."""
        if not self.root.is_dir():
            return []
        steps = (integrity.step_of(folder.name) for folder in self.root.iterdir())
        return sorted(s for s in steps if s is not None and (self.folder(s) / integrity.MANIFEST).is_file())

    def place(self, save: str) -> str:
        """Return the content of PLACE for this rank.

        Args:
            save: identifier of the save, the same on every rank.
        """
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
        """Return the steps of which every rank has its part, from one save in this layout, descending.

        Digests are not checked. All ranks call it.

        Args:
            say: called with a message on every rank when the newest step is not complete.
        """
        saves: dict[int, str] = {}
        for step in self.steps():
            # A part of another layout, or one that cannot be read, counts as missing.
            try:
                content = json_text.read(self.folder(step) / PLACE)
                if json_text.loads(self.place(content["save"])) == content:
                    saves[step] = content["save"]
            except (OSError, ValueError, KeyError, TypeError):
                continue
        parts = self.gathered(saves)
        everywhere = [step for step in parts[0] if all(part.get(step) == parts[0][step] for part in parts)]
        newest = max((step for part in parts for step in part), default=None)
        if newest is not None and newest not in everywhere:
            lacking = [rank for rank, part in enumerate(parts) if part.get(newest) != _usual(parts, newest)]
            say(
                f"{self.root}: step {newest} is not complete on all nodes (rank {', '.join(map(str, lacking[:8]))} has "
                "no part of it): another checkpoint is used"
            )
        return sorted(everywhere, reverse=True)

    def damaged(self, step: int) -> str | None:
        """Return what is wrong with any rank's part of a step, or None; all ranks call it."""
        reasons = [reason for reason in self.gathered(integrity.damage(self.folder(step))) if reason is not None]
        return reasons[0] if reasons else None

    def gathered(self, value) -> list:
        """Return the values of all ranks, by rank; all ranks call it."""
        values: list = [None] * self.mesh.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def remove(self, steps: list[int]) -> None:
        """Delete this rank's part of some steps."""
        for step in steps:
            with contextlib.suppress(OSError):  # it does not exist, or its disk has failed
                integrity.remove(self.folder(step))
            with contextlib.suppress(OSError):  # not empty: other ranks of the node have not deleted theirs yet
                integrity.step_dir(self.root, step).rmdir()

    def tidy(self) -> None:
        """Delete the folders that this rank was writing or deleting when it was killed."""
        for prefix in (integrity.UNFINISHED, integrity.REMOVED):
            for folder in self.root.glob(f"step_*/{prefix}rank_{self.mesh.rank:05d}"):
                shutil.rmtree(folder, ignore_errors=True)
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()


def _usual(parts: list[dict[int, str]], step: int) -> str:
    """Return the save of a step that most ranks have a part of."""
    saves = [part[step] for part in parts if step in part]
    return max(saves, key=saves.count)
