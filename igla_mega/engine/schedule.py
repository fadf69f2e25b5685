"""The learning rate as a pure function of the step, so that a resumed run needs nothing but its step."""

import math

from igla_mega.config.schema import Scheduler, Training


def learning_rate(step: int, training: Training, scheduler: Scheduler, *, total_steps: int, warmup_steps: int) -> float:
    """Rate of the update that follows `step` updates already made.

    Rises linearly to `learning_rate` over `warmup_steps` updates (the first takes 1/warmup_steps of it), then falls
    to `min_lr` at the last update: by half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983), linearly, or not.
    """
    peak, low = training.learning_rate, training.min_lr
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if scheduler.type == "constant":
        return peak
    done = min(1.0, (step + 1 - warmup_steps) / max(1, total_steps - warmup_steps))
    share = 1.0 - done if scheduler.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return low + (peak - low) * share
