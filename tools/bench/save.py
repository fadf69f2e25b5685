"""What an asynchronous save of the laptop model costs: the steps of a real run, with a save and without.

Every fourth step saves. The line of a step is written before its save starts, so the copy that `save` takes falls
between two lines: a step's cost is the time from the line before it to its own.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from _common import REPOSITORY, text, write

EVERY = 4


def line_times(num_ranks: int, num_steps: int, every: int) -> list[float]:
    """Run the laptop recipe; returns when each step's line appeared, seconds."""
