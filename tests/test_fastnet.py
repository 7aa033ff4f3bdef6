import shutil

import pytest
import torch

from model import registry
from model.fastnet import FastNet
from tests.learning import make_plan
from training.muon import HEAD, SHIFTS, VECTORS, Muon, orthogonal
from training.optimizers import make_optimizer


def correlated(count: int = 500) -> torch.Tensor:
    """Images as images are: neighbours and colours alike."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 1, 8, 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear")
    return smooth + 0.1 * torch.randn(count, 3, 32, 32, generator=generator)


@pytest.mark.parametrize("size", [16, 33, 64])
def test_other_sizes(size):
    assert registry.build("fastnet", 3, size).eval()(torch.zeros(2, 3, size, size)).shape == (2, 3)


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler: apt-get install g++")
def test_compiled_in_bfloat16_it_learns_what_it_learns_in_eager_mode(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # else it stays in the temporary folder
    torch.manual_seed(0)
    network, images = FastNet(3, (8,)).train(), correlated(16)[:, :, :16, :16]  # the compiler takes seconds a kernel
    gradients = []
    for learner in (network, torch.compile(network)):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = learner(images)
        torch.nn.functional.cross_entropy(logits.float(), torch.arange(16) % 3).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0.05 * float(gradients[0].abs().max()))


def test_too_small_is_said():
    with pytest.raises(ValueError, match="--size 8: fastnet cannot take it"):
        registry.build("fastnet", 3, 8)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8), (16, 16)])
def test_orthogonal_brings_all_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrix, steps=6))
    assert ((values > 0.6) & (values < 1.3)).all()
    # the singular vectors stay
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert ((u.T @ orthogonal(matrix) @ v.T) - (u.T @ orthogonal(matrix) @ v.T).diag().diag()).abs().max() < 1e-4


def test_muon_trains_parameters_of_every_shape():
    shapes = ((), (3,), (4, 3), (2, 3, 4), (2, 3, 3, 3), (2, 3, 3, 3, 3))
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for p in parameters:
        p.grad = torch.ones_like(p)
    Muon(parameters, lr=0.1).step()
    assert all((p != 1).all() for p in parameters)


def test_muons_rates_are_those_of_filters_matrices_vectors_and_biases_of_norms():
    def rates_of(arch):
        network = registry.build(arch, 10, 32)
        optimizer = make_optimizer(network, make_plan(optimizer="muon", lr=0.1))
        by_id = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
        return {name: by_id[id(p)] for name, p in network.named_parameters()}

    rates = rates_of("fastnet_small")
    norms = {
        kind: {rate for name, rate in rates.items() if "norm" in name and name.endswith(kind)}
        for kind in ("bias", "weight")
    }
    assert norms == {"bias": {SHIFTS * 0.1}, "weight": {VECTORS * 0.1}}
    assert rates["stem.bias"] == VECTORS * 0.1
    assert rates["classifier.weight"] == HEAD * 0.1
    assert rates["stem.weight"] == rates["blocks.0.conv1.weight"] == 0.1
    assert max(rates_of("resnet18").values()) == HEAD * 0.1  # the norms of others learn as other vectors do


def test_muon_keeps_the_norm_of_filters_and_moves_the_rest_as_nesterov_sgd_does():
    torch.manual_seed(0)
    filters, matrix, vector = (torch.nn.Parameter(torch.randn(shape)) for shape in ((8, 4, 3, 3), (5, 8), (8,)))
    twins = [torch.nn.Parameter(p.detach().clone()) for p in (matrix, vector)]
    ours = Muon([filters, matrix, vector], lr=0.1)
    rates = [group["lr"] for group in ours.param_groups[1:]]
    theirs = [torch.optim.SGD([p], lr=lr, momentum=0.85, nesterov=True) for p, lr in zip(twins, rates, strict=True)]
    for _ in range(3):
        for p in (filters, matrix, vector):
            p.grad = torch.randn_like(p)
        for twin, p, sgd in zip(twins, (matrix, vector), theirs, strict=True):
            twin.grad = p.grad.clone()
            sgd.step()
        ours.step()
    assert torch.allclose(matrix, twins[0])
    assert torch.allclose(vector, twins[1])
    # 0.1 times an orthogonal matrix of 8 rows away from the norm sqrt(8)
    assert filters.detach().norm() == pytest.approx(8**0.5, rel=0.15)
