"""The fused loss against the plain one, and the memory it does not use."""

from __future__ import annotations

import math
import resource

import pytest
import torch
import torch.nn.functional as F

from launch.benchmarks.compare import in_a_process
from model import ConfigError
from model.head import LARGEST_SOFTCAP, Head, Tiles, linear_cross_entropy, softcapped_logits
from tests.harness.report import report

T, V, D, CAP = 37, 301, 16, 30.0


@pytest.mark.parametrize("tiles", [(1, 301), (8, 64), (37, 7), (64, 1000)], ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_values_and_gradients_equal_the_plain_loss(tiles: tuple[int, int], z_loss: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator, dtype=torch.float64) * 3 for n in (T, V))
    hidden.requires_grad_(), weight.requires_grad_()
    labels = torch.randint(0, V, (T,), generator=generator)
    logits = softcapped_logits(hidden @ weight.T, CAP)
    nll = F.cross_entropy(logits, labels, reduction="sum")
    z = logits.logsumexp(-1).square().sum()
    expected = torch.autograd.grad((nll + z_loss * z) / T, (hidden, weight))
    found = linear_cross_entropy(hidden, weight, labels, softcap=CAP, z_loss=z_loss, tiles=Tiles(*tiles))
    torch.testing.assert_close(found.nll, nll, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.z, z, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.total, nll + z_loss * z, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(found.total / T, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tiles", [(1, 301), (8, 64), (37, 7), (64, 1000)], ids=str)
def test_log_probs_and_gradients_of_any_weights_equal_the_plain_formula(tiles: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator, dtype=torch.float64) * 3 for n in (T, V))
    hidden.requires_grad_(), weight.requires_grad_()
    labels = torch.randint(0, V, (T,), generator=generator)
    expected = softcapped_logits(hidden @ weight.T, CAP).log_softmax(-1)[torch.arange(T), labels]
    found = Head(CAP).log_probs(hidden, weight, labels, Tiles(*tiles))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    weights = torch.randn(T, generator=generator, dtype=torch.float64)  # known only afterwards
    weights[3] = 0
    for a, b in zip(*(torch.autograd.grad(x, (hidden, weight), weights) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_log_probs_of_no_tokens_and_in_bfloat16() -> None:
    hidden, weight = torch.randn(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    Head(CAP).log_probs(hidden, weight, torch.empty(0, dtype=torch.long)).sum().backward()
    assert weight.grad is not None and not weight.grad.any()
    hidden, weight = (torch.randn(n, D).bfloat16().requires_grad_() for n in (T, V))
    found = Head(CAP).log_probs(hidden, weight, torch.randint(0, V, (T,)), Tiles(8, 100))
    found.sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    assert found.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_bfloat16_hidden_states_give_a_float32_loss() -> None:
    hidden, weight = torch.randn(T, D, dtype=torch.bfloat16), torch.randn(V, D, dtype=torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    labels = torch.randint(0, V, (T,))
    loss = linear_cross_entropy(hidden, weight, labels, softcap=CAP, tiles=Tiles(8, 100))
    loss.total.backward()
    assert hidden.grad is not None and weight.grad is not None
    plain = F.cross_entropy(softcapped_logits(hidden.float() @ weight.float().T, CAP), labels, reduction="sum")
    assert loss.total.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert abs(loss.total.item() / plain.item() - 1) < 1e-2


def test_a_second_backward_is_refused_rather_than_wrong() -> None:
    hidden, weight = torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    total = linear_cross_entropy(hidden, weight, torch.randint(0, V, (T,)), softcap=CAP).total
    (total / T).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        (total / T).backward()


def test_scores_at_the_largest_cap_keep_their_sums_finite() -> None:
    """All of a row's scores at the cap, and all but the label's at its negative: the ends of float32."""
    weight = torch.ones(V, 1) * 1e4
    hidden, labels = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])
    found = linear_cross_entropy(hidden, weight, labels, softcap=LARGEST_SOFTCAP)
    assert found.nll.item() == pytest.approx(2 * math.log(V), rel=1e-5)
    most = math.exp(LARGEST_SOFTCAP) * 262_144
    assert most < torch.finfo(torch.float32).max and math.exp(-LARGEST_SOFTCAP) > torch.finfo(torch.float32).tiny
    with pytest.raises(ConfigError, match=r"softcapping=90\.0 is too large; largest legal: 70\.0"):
        Head(90.0)


def test_no_tokens_is_a_loss_of_zero_with_zero_gradients() -> None:
    hidden, weight = torch.randn(0, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    total = linear_cross_entropy(hidden, weight, torch.empty(0, dtype=torch.long), softcap=CAP).total
    total.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert total == 0 and not weight.grad.any() and hidden.grad.shape == (0, D)


def _peak_growth(tokens: int, fused: bool) -> int:
    """Bytes by which forward and backward raise the peak of a process of their own."""

    def measure() -> int:
        hidden = torch.randn(tokens, 64, requires_grad=True)
        weight = torch.randn(262_144, 64, requires_grad=True)
        labels = torch.randint(0, 262_144, (tokens,))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if fused:
            linear_cross_entropy(hidden, weight, labels, softcap=CAP).total.backward()
        else:
            F.cross_entropy(softcapped_logits(hidden @ weight.T, CAP), labels, reduction="sum").backward()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024

    return in_a_process(measure)


def test_the_logits_of_the_batch_never_exist() -> None:
    one_logits_tensor = 256 * 262_144 * 4
    fused, plain = _peak_growth(256, fused=True), _peak_growth(256, fused=False)
    report(
        "Peak memory of the loss, 256 tokens x 262,144 pieces",
        {"fused MiB": fused >> 20, "plain MiB": plain >> 20, "one [T, V] tensor MiB": one_logits_tensor >> 20},
    )
    assert plain > one_logits_tensor, "the measure must see the plain loss's logits"
    assert fused < one_logits_tensor
