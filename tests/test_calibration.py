import pytest
import torch

from training.calibration import fit_temperature
from training.metrics import expected_calibration_error


def drawn(temperature: float, count: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose confidences are calibrated if they are divided by `temperature`."""
    generator = torch.Generator().manual_seed(0)
    honest = 2 * torch.randn(count, 5, generator=generator)
    targets = torch.multinomial(honest.softmax(dim=1), 1, generator=generator)[:, 0]
    return honest * temperature, targets


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_temperature_of_a_known_distribution_is_found(temperature):
    logits, targets = drawn(temperature)
    found = fit_temperature(logits, targets)
    assert found == pytest.approx(temperature, rel=0.05)
    assert expected_calibration_error((logits / found).softmax(dim=1), targets) < 0.01


def test_no_temperature_near_it_has_a_smaller_loss():
    logits, targets = drawn(1.7, 500)
    found = fit_temperature(logits, targets)
    losses = [float(torch.nn.functional.cross_entropy(logits / (found * f), targets)) for f in (0.97, 1, 1.03)]
    assert min(losses) == losses[1]


@pytest.mark.parametrize("mistakes", [0, 9])
def test_few_mistakes_say_too_little(mistakes):
    logits, targets = 3 * torch.eye(3).repeat(100, 1), torch.arange(3).repeat(100)
    targets[:mistakes] = (targets[:mistakes] + 1) % 3
    assert fit_temperature(logits, targets) == 1.0
    targets[:10] = (torch.arange(10) + 1) % 3
    assert fit_temperature(logits, targets) != 1.0
