"""Something to do on the way, after every so many steps."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback

from .ranks import first


class Every(TrainerCallback):
    """Calls a hook with the policy, in eval mode, and the step; the training's random numbers stay as they were.

    Args:
        steps: between two calls; the last step of a run is left to what comes after it.
        hook: called in the first process alone.
    """

    def __init__(self, steps: int, hook: Callable[[Any, int], None]):
        self._steps, self._hook = steps, hook

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self._steps or state.global_step >= state.max_steps or not first():
            return
        training = model.training
        model.eval()
        with torch.random.fork_rng():
            self._hook(model, state.global_step)
        model.train(training)
