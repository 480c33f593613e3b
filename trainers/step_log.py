"""What a run tells at every step: a row of `metrics.jsonl`, a line on the screen, and its state.

Also where it listens: SIGINT and SIGTERM end a run after the step that is being taken, with a checkpoint; a second
signal ends it at once.
"""

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..progress import Advance, ignored
from .ranks import agreed
from .run_folder import write_state


class StepLog(TrainerCallback):
    """A trainer callback.

    Args:
        out: the run folder.
        say: where lines go.
        done: hears of every step.
    """

    def __init__(self, out: Path, say: Callable[[str], None], done: Advance = ignored):
        self._out, self._say, self._done = out, say, done
        self.signal: int | None = None
        self._due = False  # a checkpoint that waits for the end of its batch
        self._began, self._spent = time.perf_counter(), 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        write_state(self._out, "running", state.global_step, state.max_steps)

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._spent += time.perf_counter() - self._began
        write_state(self._out, "running", state.global_step, state.max_steps)
        self._done(1)
        self.signal = agreed(self.signal)
        self._due |= control.should_save
        # A batch may serve several steps. A run goes on with a new one, so it is saved and stopped where one ends.
        apart = args.steps_per_generation * getattr(args, "num_iterations", 1)
        between = state.global_step * args.gradient_accumulation_steps % apart == 0
        control.should_save = between and (self._due or self.signal is not None)
        if control.should_save:
            self._due = False
        if between and self.signal is not None:
            control.should_training_stop = True
        return control

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or not state.is_world_process_zero:  # or: the summary at the end
            return
        seconds, self._spent = self._spent, 0.0  # of all steps since the last row
        row = {
            "step": state.global_step,
            "seconds": round(seconds, 3),
            **{k: v for k, v in logs.items() if isinstance(v, (int, float))},
        }
        with (self._out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if "reward" not in logs:  # a further step on a batch that an earlier step generated
            self._say(f"step {state.global_step}/{state.max_steps}  same samples again  {seconds:.0f} s")
            return
        shares = [
            f"  {name} {abs(logs[key]):.0%}"
            for name, key in (
                ("surfaced", "terms/surfaced/raw"),
                ("rejected", "terms/rejected/raw"),
                ("complied", "terms/behaviour/raw" if "terms/behaviour/raw" in logs else "terms/pressure/raw"),
            )
            if key in logs  # a reward need not have these terms, nor a batch a prompt where they apply
        ]
        length = logs.get("completions/mean_length", 0)
        reward = "none" if logs["reward"] is None else f"{logs['reward']:+.2f}"  # none: every row was masked
        self._say(
            f"step {state.global_step}/{state.max_steps}  reward {reward}{''.join(shares)}  "
            f"length {length:.0f}  {seconds:.0f} s"
        )

    @contextmanager
    def listening(self) -> Iterator[None]:
        """End the run after its step at the first SIGINT or SIGTERM. Outside the main thread none can be caught."""

        def note(number: int, frame: Any) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number
            self._say(f"{signal.Signals(number).name}: saving after this step; once more to stop at once")

        try:
            old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)
