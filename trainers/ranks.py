"""Several processes that train one policy together, as `torchrun` or `accelerate launch` start them: which of them
speaks and writes. TRL and accelerate see to samples, rewards and gradients.
"""

import os


def first() -> bool:
    """Whether this process is the one that writes the run folder, audits and prints; true where it is alone."""
    return int(os.environ.get("RANK", "0")) == 0


def together() -> None:
    """Wait for the other processes, if there are any."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def agreed(number: int | None) -> int | None:
    """The same for all processes: the largest number that any of them has, or None."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return number
    from accelerate.utils import gather_object

    return max((n for n in gather_object([number]) if n is not None), default=None)


def part() -> None:
    """Leave the other processes, if there are any, when nothing more is to be done together. Left to the end of the
    interpreter, the threads of the group can abort a process that has finished its work.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()
