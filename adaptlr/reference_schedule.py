"""The schedule of :mod:`adaptlr.reference`: section 1."""

from __future__ import annotations

import math

from adaptlr.reference_state import Config, Decay, State


def schedule(config: Config, step: float) -> float:
    """Return the multiplier of the peak at a step (equation 2)."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if 0 < config.total_steps <= step:
        return config.final_multiplier
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay(config, step)


def decay(config: Config, step: float) -> float:
    """Return d of equation (2), which falls from 1 after warm-up."""
    age = step + 1 - config.warmup_steps
    match config.decay:
        case Decay.CONSTANT:
            return 1.0
        case Decay.INVERSE_SQRT:
            return math.sqrt(config.timescale / (age + config.timescale))
        case Decay.TABLE:
            return float(config.table[int(step)])
    x = age / (config.total_steps - config.warmup_steps)
    match config.decay:
        case Decay.COSINE:
            return half_cosine(x)
        case Decay.LINEAR:
            return 1 - x
        case Decay.WSD:
            return min(1.0, (1 - x) / config.decay_share)
    turns = config.cycles * x
    return half_cosine(turns - math.ceil(turns) + 1)


def half_cosine(x: float) -> float:
    """Return (1 + cos(pi x)) / 2 without its cancellation near 1: the log of an LR is a sample."""
    return math.sin(math.pi / 2 * (1 - x)) ** 2


def own_schedule(config: Config, state: State) -> float:
    """Return the multiplier of this run: a restart's re-warming takes the place of the warm-up.

    After a search the warm-up begins where that ended. Where the search took no step, the peak is
    held for as long.
    """
    start = state.warmup_start
    if start and not state.restarted and state.step < config.warmup_steps:
        steps = max(config.warmup_steps - abs(start), 1)
        return min((state.step - max(start, 0) + 1) / steps, 1.0)
    step = max(state.step, config.warmup_steps) if state.restarted else state.step
    return schedule(config, step)


def last_multiplier(config: Config) -> float:
    """Return the last multiplier before T that is not zero; 0 (unused) for a run without end."""
    steps = reversed(range(int(config.total_steps)))
    return next((m for m in (schedule(config, step) for step in steps) if m), 0.0)
