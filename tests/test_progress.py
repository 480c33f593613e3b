"""Progress: a bar on a terminal, lines in a log, and pools that tell how far they are."""

from io import StringIO

import pytest
from rich.console import Console

from unfeign import progress as module
from unfeign.progress import progress
from unfeign.trainers.rollouts import InProcessPool, RolloutRequest, Sampling


def shown(terminal: bool, done: int = 0, lines: bool = True) -> str:
    page = StringIO()
    console = Console(file=page, force_terminal=terminal, width=100)
    with progress("sampling", 5, done, lines=lines, console=console) as advance:
        for units in (1, 2, 2 - done):
            advance(units)
    return page.getvalue()


def test_a_terminal_sees_a_bar():
    assert "sampling" in shown(True) and "5/5" in shown(True)


def test_a_log_sees_lines_now_and_then(monkeypatch):
    assert shown(False) == "", "too short to speak of"
    monkeypatch.setattr(module, "EVERY", 0.0)
    assert shown(False).splitlines() == ["sampling: 1/5", "sampling: 3/5"]
    assert shown(False, lines=False) == ""
    assert shown(False, done=1).splitlines() == ["sampling: 2/5", "sampling: 4/5"]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_pool_tells_how_far_it_is(base, tokenizer, batch):
    pool, heard = InProcessPool(tokenizer, batch), []
    pool.push(base, 0)
    found = pool.generate(
        [RolloutRequest([5, 6], seed) for seed in range(5)], 0, Sampling(2), lambda *some: heard.append(some)
    )
    assert [row for rows, _ in heard for row in rows] == list(range(5))
    assert [sample for _, samples in heard for sample in samples] == found and len(heard) == -(-5 // batch)
