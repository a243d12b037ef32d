"""Bits per byte against hand computations, and what it refuses."""
import math
from types import SimpleNamespace

import pytest
import torch

from nanochat.loss_eval import evaluate_bpb


class FixedLoss:
    """Gives the losses that it was made with, in any shape; its device may be text or an object."""
    def __init__(self, losses, device="cpu"):
        self.losses, self.device, self.calls = torch.as_tensor(losses), device, 0

    def __call__(self, x, y, loss_reduction):
        assert loss_reduction == "none" and not torch.is_grad_enabled()
        self.calls += 1
        return self.losses.expand(y.numel()) if self.losses.ndim == 0 else self.losses

    def get_device(self):
        return self.device


def batch(*targets):
    y = torch.tensor(targets)
    return torch.zeros_like(y), y


TOKEN_BYTES = torch.tensor([0, 1, 2, 3], dtype=torch.int32)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_worked_example(device):
    """Targets with 0, 1, 2 bytes and an ignored one, 2 nats each: 4 nats over 3 bytes = 4 / (3 ln 2)."""
    bpb = evaluate_bpb(FixedLoss(2.0, device), [batch([0, 1], [2, -1])], 1, TOKEN_BYTES)
    assert bpb == pytest.approx(1.9235934) and isinstance(bpb, float)


def test_losses_that_do_not_count_may_be_anything():
    losses = torch.tensor([[math.nan, 1.0], [1.0, math.inf]])
    bpb = evaluate_bpb(FixedLoss(losses), [batch([0, 3], [1, -1])], 1, TOKEN_BYTES)
    assert bpb == pytest.approx(2 / (4 * math.log(2)))


def test_sums_run_over_batches_and_take_no_more_than_they_need():
    batches = iter([batch([1, 2]), batch([3, 3]), batch([1, 1])])
    model = FixedLoss(torch.tensor([1.0, 2.0]))
    assert evaluate_bpb(model, batches, 2, TOKEN_BYTES) == pytest.approx(6 / (9 * math.log(2)))
    assert model.calls == 2 and len(list(batches)) == 1


def test_batches_may_carry_a_state_and_lie_in_any_order_in_memory():
    x, y = batch([1, 2, 3], [3, 1, 2])
    batches = [(x, y.t().contiguous().t(), {"epoch": 1})]
    assert evaluate_bpb(FixedLoss(torch.ones(6)), batches, 1, TOKEN_BYTES) == pytest.approx(6 / (12 * math.log(2)))


def test_many_small_losses_are_not_lost():
    """In fp32, adding 1e-4 to 2^14 = 16384 changes nothing."""
    losses = iter([torch.tensor([16384.0])] + [torch.tensor([1e-4])] * 1000)

    class Model(FixedLoss):
        def __call__(self, x, y, loss_reduction):
            return next(losses)

    bpb = evaluate_bpb(Model(0.0), [batch([1])] * 1001, 1001, TOKEN_BYTES)
    assert bpb == pytest.approx(16384.1 / (1001 * math.log(2)), rel=1e-8)


def test_nothing_to_count_is_infinite():
    assert evaluate_bpb(FixedLoss(1.0), [batch([0, -1])], 1, TOKEN_BYTES) == math.inf


@pytest.mark.parametrize("steps, table, message", [
    (0, TOKEN_BYTES, "at least 1 batch, got 0"),
    (2, TOKEN_BYTES, "2 batches were to be evaluated, but there are only 1"),
    (1, TOKEN_BYTES[:3], "target 3 is not among the 3 tokens"),
    (1, TOKEN_BYTES[None], r"got shape \(1, 4\)"),
])
def test_what_is_refused(steps, table, message):
    with pytest.raises(ValueError, match=message):
        evaluate_bpb(FixedLoss(1.0), [batch([1, 3])], steps, table)


def test_a_table_of_another_vocabulary_is_refused_before_the_first_batch():
    model = FixedLoss(1.0)
    model.config = SimpleNamespace(vocab_size=3)
    with pytest.raises(ValueError, match="each of the model's 3 tokens"):
        evaluate_bpb(model, [batch([1, 2])], 1, TOKEN_BYTES)
    assert model.calls == 0
