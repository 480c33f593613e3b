"""The truncated importance ratio."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unfeign.trainers.importance import truncated_ratio

OWN = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]])
SAMPLED = torch.tensor([[-1.0, -4.0, -2.0], [-2.0, -2.0, 0.0]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])


def test_by_token():
    ratio = truncated_ratio(OWN, SAMPLED, MASK, "token", 2.0)
    torch.testing.assert_close(ratio.values, torch.tensor([[1.0, 2.0, math.exp(-1)], [2.0, 2.0, 1.0]]))
    assert ratio.max == pytest.approx(math.exp(2)) and ratio.truncated == pytest.approx(3 / 5)


def test_by_sequence():
    ratio = truncated_ratio(OWN, SAMPLED, MASK, "sequence", 5.0)
    e = math.exp(1)
    torch.testing.assert_close(ratio.values, torch.tensor([[e, e, e], [5.0, 5.0, 1.0]]))
    assert ratio.truncated == pytest.approx(2 / 5)


@settings(deadline=None, max_examples=50)
@given(shift=st.floats(-30, 30), level=st.sampled_from(["token", "sequence"]), cap=st.floats(1, 8), same=st.booleans())
def test_ratios_are_finite_capped_and_1_where_nothing_differs(shift, level, cap, same):
    ratio = truncated_ratio(OWN, OWN if same else OWN - shift, MASK, level, cap)
    assert ratio.values.isfinite().all() and (ratio.values <= cap + 1e-6).all() and ratio.values[1, 2] == 1
    if same:
        assert (ratio.values == 1).all() and ratio.mean == 1 and ratio.truncated == 0
