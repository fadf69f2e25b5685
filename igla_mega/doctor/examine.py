"""The verb `doctor`: list what is installed, then test this node, or all nodes under a launcher."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from igla_mega.doctor import installed, network, node_test
from igla_mega.doctor.measure import node_name


@dataclass(frozen=True)
class Examination:
    """What to examine, and how to report it."""

    limits: node_test.Limits
    run_dir: Path
    """Folder that the run will write; its disk is measured."""
    load: bool = True
    """False to list what is installed without putting load on the machine."""
    full: bool = False
    """True to measure for half a minute, so that heat and full caches show."""
    as_json: bool = False


def examine(asked: Examination) -> bool:
    """Print what is installed and how the nodes perform. Every rank calls it; rank 0 prints.

    Returns:
        True if every node is fit.
    """
    is_main, under_launcher = os.environ.get("RANK", "0") == "0", "RANK" in os.environ
    rows = installed.rows()
    unfit = installed.unfit(int(os.environ.get("LOCAL_RANK", 0)) if under_launcher else None)
    if is_main and not asked.as_json:
        print_rows(rows)
    for reason in unfit:
        print(f"bad: {node_name()}: {reason}", file=sys.stderr)
    # A warning alone: a firewall, which cannot be seen from here, may close what is open.
    open_to = network.exposure() if os.environ.get("LOCAL_RANK", "0") == "0" else []
    for sentence in open_to:
        print(f"warning: {node_name()}: {sentence}", file=sys.stderr)
    answer: dict[str, Any] = {"installed": [dict(zip(("what", "state", "use"), row, strict=True)) for row in rows]}
    answer |= {"unfit": unfit, "network": open_to}
    bad = bool(unfit)
    if asked.load and not unfit:
        reports = node_test.test(node_test.start(), asked.run_dir, full=asked.full)
        found = node_test.verdicts(reports, asked.limits)
        answer |= node_test.as_json(reports, found, asked.limits)
        bad = bool(found)
        if is_main and not asked.as_json:
            print(node_test.text(reports, found))
    if is_main and asked.as_json:
        print(json.dumps(answer, indent=1))
    return not bad


def print_rows(rows: Sequence[Sequence[str]]) -> None:
    """Print the table of what is installed."""
    table = Table(*installed.COLUMNS)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
