"""The running average of the weights is what its formula says, in pieces as in whole."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from foundation.training.average import Average


@given(
    steps=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=8),
    half_life=st.integers(1, 1000),
    stride=st.integers(1, 64),
)
def test_the_average_forgets_half_of_the_past_in_a_half_life(steps: list[float], half_life: int, stride: int) -> None:
    weight = torch.ones(3)
    average = Average({"w": weight}, half_life, stride, lambda tensor: tensor)
    expected, decay = 1.0, 0.5 ** (stride / half_life)
    for value in steps:
        weight.fill_(value)
        average.update()
        expected = decay * expected + (1 - decay) * value
    assert torch.allclose(average.values["w"], torch.full((3,), expected), atol=1e-5)
    assert torch.equal(weight, torch.full((3,), steps[-1]))


def test_empty_pieces_are_averaged_to_nothing_and_pieces_to_what_the_whole_gives() -> None:
    whole, pieces = torch.arange(6.0), [torch.arange(6.0)[:4], torch.arange(6.0)[4:], torch.arange(6.0)[6:]]
    one = Average({"w": whole}, 10, 5, lambda tensor: tensor)
    many = Average({str(i): piece for i, piece in enumerate(pieces)}, 10, 5, lambda tensor: tensor)
    for each in (whole, *pieces):
        each.mul_(-3)
    one.update()
    many.update()
    assert torch.equal(torch.cat(list(many.values.values())), one.values["w"])


def test_the_exchange_of_weights_and_average_undoes_itself() -> None:
    weight = torch.tensor([1.0, 2.0])
    average = Average({"w": weight}, 1, 1, lambda tensor: tensor)
    weight.mul_(5)
    average.exchange()
    assert weight.tolist() == [1.0, 2.0]
    assert average.values["w"].tolist() == [5.0, 10.0]
    average.exchange()
    assert weight.tolist() == [5.0, 10.0]
