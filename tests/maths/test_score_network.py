"""The networks of the score-based page: Fourier features, the MLP, the U-Net with both embeddings."""

import math

import score_based_diffusion_example as sb

import pytest
import torch
from exact_scores import Bounded
from torch.testing import assert_close


def test_fourier_features_are_fixed_and_bounded():
    features = sb.FourierFeatures(2000)
    assert not list(features.parameters()) and "W" in features.state_dict()
    assert features.W.std().item() == pytest.approx(16, rel=0.05)
    out = features(torch.tensor([0.3]))
    assert_close(out[0, :2000] ** 2 + out[0, 2000:] ** 2, torch.ones(2000))


def test_fourier_features_are_sine_and_cosine_of_2_pi_w_t():
    features = sb.FourierFeatures(3)
    features.W.copy_(torch.tensor([0.25, 1.0, -2.0]))
    sin, cos = [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]  # at t = 1
    assert_close(features(torch.ones(1)), torch.tensor([sin + cos]), rtol=0, atol=1e-5)
    t = torch.tensor([-4.6, 0.7, 3.9]).double()
    angles = 2 * math.pi * t[:, None] * features.W.double()
    assert_close(features.double()(t), torch.cat([angles.sin(), angles.cos()], 1), rtol=0, atol=1e-9)


def small_unet(fourier, patch=1):
    return sb.UNet(1, 8, 8, (1, 2), 1, (4,), groups=4, dropout=0.0, patch=patch, fourier=fourier)


@pytest.mark.slow
@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("fourier", [False, True])
def test_unet_learns_with_both_embeddings(fourier, patch):
    """Zero at first; after a few steps every weight has moved and the answer depends on t."""
    model = small_unet(fourier, patch)
    before = [p.clone() for p in model.parameters()]
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([3.0, 0.5, -2.0, 1.0])
    assert model(x, t).abs().max() == 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(6):
        optimizer.zero_grad()
        (model(x, t) - x).pow(2).mean().backward()
        optimizer.step()
    still = [n for (n, p), b in zip(model.named_parameters(), before, strict=True) if torch.equal(p, b)]
    assert not still
    assert (model(x, t) - model(x, t + 1)).abs().max() > 1e-4


def test_mlp_fits_a_line():
    model = sb.ScoreMLP(2, 32, 2)
    x, t = torch.randn(256, 2), 999 * torch.rand(256)
    assert model(x, t).abs().max() == 0
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(x, t) - x * (t / 999)[:, None]).pow(2).mean()
        loss.backward()
        optimizer.step()
    assert loss < 0.02


@pytest.mark.parametrize("sde", ["ve", "vp"])
def test_the_network_is_that_of_the_data_and_holds_sigma_data(sde):
    cfg = sb.Config(sde=sde, channels=8, groups=4, hidden=16)
    for shape, kind in (((1, 28, 28), sb.UNet), ((2,), sb.ScoreMLP)):
        network = sb.make_network(cfg, shape)
        assert type(network) is kind and network.state_dict()["sigma_data"] == 0.5
        assert (network.fourier is not None) == (sde == "ve")


@pytest.mark.slow
@pytest.mark.parametrize("fourier", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "unet"])
def test_networks_work_in_float64(kind, fourier):
    """As they do in float32, through the score, a sampler and the likelihood."""
    network = sb.ScoreMLP(2, 16, 2, fourier) if kind == "mlp" else small_unet(fourier)
    with torch.no_grad():
        for p in network.eval().parameters():  # none stays at the zero that it starts from
            if not p.any():
                p.normal_(std=0.3)
    sde = sb.VESDE() if fourier else sb.VPSDE()
    x = torch.randn(3, 2) if kind == "mlp" else torch.randn(3, 1, 8, 8)
    t = torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad():
        single = sb.network_eps(network, sde, x, t)
        double = sb.network_eps(network.double(), sde, x.double(), t.double())
    assert single.dtype == torch.float32 and double.dtype == torch.float64
    assert_close(single.double(), double, rtol=0.02, atol=0.02 if fourier else 1e-3)
    score = Bounded(sb.score_fn(network, sde, clip_x0=True))
    assert sb.final(sb.sde_process(sb.em_step, score, sde, x.double(), 2)).dtype == torch.float64
    logp = sb.log_likelihood(score, sde, x.double(), "hutchinson", tolerance=0.5, eps=0.3)
    assert logp.dtype == torch.float64 and logp.isfinite().all()
    loss = sb.score_loss(network, sde, x.double(), t.double(), x.double())
    loss.backward()
    assert all(p.grad.dtype == torch.float64 for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("H, W", [(8, 4), (4, 8)])
def test_images_need_not_be_square(H, W):
    sde, model = sb.VPSDE(), small_unet(False)
    score = sb.score_fn(model, sde, clip_x0=True)
    x = sb.final(sb.sampling_process(sb.Config(N=2), score, sde, torch.randn(2, 1, H, W)))
    assert x.shape == (2, 1, H, W) and x.isfinite().all()
    assert sb.log_likelihood(score, sde, x, "hutchinson", tolerance=0.1).shape == (2,)
