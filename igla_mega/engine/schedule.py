"""Compute the learning rate as a pure function of the step, so that a resumed run needs only its step."""

import math

from igla_mega.config.schema import Scheduler, Training


def learning_rate(step: int, training: Training, scheduler: Scheduler, *, total_steps: int, warmup_steps: int) -> float:
    """Return the learning rate of the update that follows `step` earlier updates.

    It rises linearly to `learning_rate` over `warmup_steps` updates (the first uses 1/warmup_steps of it), then decays
    towards `min_lr`, which it reaches after the last update: by half a cosine (Loshchilov & Hutter 2017,
    arXiv:1608.03983), linearly, or, with `constant`, not at all. No update has a rate of 0: with `min_lr` 0 it would
    train nothing. After the warm-up the rates are those of transformers and of Megatron-LM; in it, theirs start at 0.
    """
    peak, low = training.learning_rate, training.min_lr
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if scheduler.type == "constant":
        return peak
    # Bounded, since a run may be extended beyond `total_steps`.
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    factor = 1.0 - progress if scheduler.type == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return low + (peak - low) * factor
