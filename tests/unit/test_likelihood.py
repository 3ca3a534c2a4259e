"""Chunked log-probabilities and their gradient against the plain whole-logits way."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shared.likelihood import token_logprobs

N, WIDTH, VOCABULARY = 37, 24, 301


def case(dtype: torch.dtype, with_bias: bool = False):
    noise = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, WIDTH, generator=noise).to(dtype).requires_grad_()
    head_VD = torch.randn(VOCABULARY, WIDTH, generator=noise).to(dtype)
    bias_V = torch.randn(VOCABULARY, generator=noise).to(dtype) if with_bias else None
    targets_N = torch.randint(VOCABULARY, (N,), generator=noise)
    weights_N = torch.randn(N, generator=noise) ** 3
    return hidden_ND, head_VD, bias_V, targets_N, weights_N


def plain(hidden_ND, head_VD, bias_V, targets_N):
    logits_NV = F.linear(hidden_ND, head_VD, bias_V)
    return (logits_NV if logits_NV.dtype is torch.float64 else logits_NV.float()).log_softmax(-1)[
        torch.arange(len(targets_N)), targets_N
    ]


@pytest.mark.parametrize("block", [1, 64, VOCABULARY, 1000])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradient_under_unequal_weights(block: int, with_bias: bool):
    hidden_ND, head_VD, bias_V, targets_N, weights_N = case(torch.float32, with_bias)
    expected_N = plain(hidden_ND, head_VD, bias_V, targets_N)
    (expected_grad,) = torch.autograd.grad((expected_N * weights_N).sum(), hidden_ND)
    logprobs_N, best_N = token_logprobs(hidden_ND, head_VD, bias_V, targets_N, block=block)
    (grad,) = torch.autograd.grad((logprobs_N * weights_N).sum(), hidden_ND)
    torch.testing.assert_close(logprobs_N, expected_N, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(best_N, F.linear(hidden_ND, head_VD, bias_V).argmax(-1))


def test_a_loss_that_is_not_linear_in_the_log_probabilities():
    hidden_ND, head_VD, _, targets_N, _ = case(torch.float64)

    def loss(hidden):
        logprobs_N, _ = token_logprobs(hidden, head_VD, None, targets_N, block=70)
        return logprobs_N.square().sum() + logprobs_N[:3].prod()

    assert torch.autograd.gradcheck(loss, (hidden_ND,), fast_mode=True)


def test_bfloat16_errs_no_more_than_the_plain_way():
    hidden_ND, head_VD, _, targets_N, weights_N = case(torch.bfloat16)
    exact_ND = hidden_ND.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad((plain(exact_ND, head_VD.float(), None, targets_N) * weights_N).sum(), exact_ND)

    def error(logprobs_N: torch.Tensor) -> float:
        assert logprobs_N.dtype is torch.float32
        (grad,) = torch.autograd.grad((logprobs_N * weights_N).sum(), hidden_ND)
        assert grad.dtype is torch.bfloat16
        return float((grad.float() - exact).norm() / exact.norm())

    plain_error = error(plain(hidden_ND, head_VD, None, targets_N))
    assert 1e-4 < plain_error < 0.05
    assert error(token_logprobs(hidden_ND, head_VD, None, targets_N)[0]) <= 1.5 * plain_error


def test_a_head_that_trains_gets_its_gradient():
    hidden_ND, head_VD, _, targets_N, weights_N = case(torch.float32)
    head_VD.requires_grad_()
    expected = torch.autograd.grad((plain(hidden_ND, head_VD, None, targets_N) * weights_N).sum(), [hidden_ND, head_VD])
    logprobs_N, _ = token_logprobs(hidden_ND, head_VD, None, targets_N)
    actual = torch.autograd.grad((logprobs_N * weights_N).sum(), [hidden_ND, head_VD])
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_of_vocabulary_width_is_kept_for_backward():
    hidden_ND, head_VD, _, targets_N, _ = case(torch.float32)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        token_logprobs(hidden_ND, head_VD, None, targets_N)
    assert kept == [(N, WIDTH)]
