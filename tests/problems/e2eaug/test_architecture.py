"""The alphas as a module of their own."""

import math

import torch

from mlseg.problems.e2eaug.networks.architecture import Architecture


def test_the_alphas_are_the_only_parameters_and_start_undecided() -> None:
    architecture = Architecture(16)
    assert [name for name, _ in architecture.named_parameters()] == ["alphas"]
    assert not list(architecture.buffers())
    weights = architecture()
    assert weights.shape == (16, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(16))
    assert (weights - 1 / 3).abs().max() < 2e-3
    assert 2e-4 < float(architecture.alphas.detach().std()) < 2e-3


def test_entropy_and_choices() -> None:
    architecture = Architecture(3)
    with torch.no_grad():
        architecture.alphas.copy_(torch.tensor([[0.0, 0, 0], [100, 0, 0], [0, math.log(2), -100]]))
    expected = torch.tensor([math.log(3), 0.0, math.log(3) - 2 / 3 * math.log(2)])
    torch.testing.assert_close(architecture.entropy(), expected)
    assert architecture.choices()[1:] == ["4-2-1", "6-2-2"]
    architecture.entropy().sum().backward()
    assert architecture.alphas.grad is not None
    assert architecture.alphas.grad.isfinite().all()


def test_own_generator_draws_a_random_architecture() -> None:
    first, second = (
        Architecture(4, scale=2.0, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first.alphas, second.alphas)
    assert first.entropy().min().item() < 1.0


def test_by_sigmoid_each_weight_is_its_own() -> None:
    architecture = Architecture(2, selection="sigmoid")
    with torch.no_grad():
        architecture.alphas.copy_(torch.tensor([[0.0, 0.0, 0.0], [100.0, -100.0, 0.0]]))
    expected = torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 0.5]])
    torch.testing.assert_close(architecture(), expected)
    # Relative to their sum: a third each; two thirds and one third.
    uneven = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    torch.testing.assert_close(architecture.entropy(), torch.tensor([math.log(3), uneven]))
    assert architecture.choices()[1] == "4-2-1"
    # One alpha moves its own weight alone.
    (gradient,) = torch.autograd.grad(architecture()[0, 0], architecture.alphas)
    torch.testing.assert_close(gradient, torch.tensor([[0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]))
