"""The alphas as a module of their own."""

import math

import pytest
import torch

from mlseg.errors import UserError
from mlseg.problems.e2eaug.networks.architecture import Architecture, Selection


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


@pytest.mark.parametrize("selection", ["softmax", "sigmoid"])
def test_a_choice_leaves_one_candidate_alone(selection: Selection) -> None:
    architecture = Architecture(2, selection=selection)
    architecture.choose("6-2-2")
    assert torch.equal(architecture()[:, 1], torch.ones(2))
    assert not architecture()[:, ::2].any(), "a number next to 0 makes every one after it subnormal"
    assert architecture.choices() == ["6-2-2"] * 2
    assert float(architecture.entropy().max()) < 1e-12
    with pytest.raises(UserError, match="there are 4-2-1, 6-2-2, 8-2-3"):
        architecture.choose("5-2-1")


def test_lambda_is_a_parameter_only_where_it_is_learned() -> None:
    assert Architecture(2).synthetic_weight() is None
    architecture = Architecture(2, synthetic_weight=0.3)
    names = [name for name, _ in architecture.named_parameters()]
    assert names == ["alphas", "log_synthetic_weight"]
    weight = architecture.synthetic_weight()
    assert weight is not None
    assert float(weight) == pytest.approx(0.3)


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
