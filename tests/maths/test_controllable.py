"""experiments/controllable.py: completing and colouring from exact scores, masks, the noisy classifier."""

import score_based_diffusion_example as sb

import pytest
import torch
from conftest import experiment, spied
from exact_scores import SDES, Correlated, gaussian
from torch.nn import functional as F
from torch.testing import assert_close

controllable = experiment("controllable")


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_independent_dimensions_are_completed_as_they_are_drawn(name):
    """Then the method is exact. What is known is kept to the last bit, in its own dtype."""
    sde = SDES[name]()
    known = torch.tensor([0.875, 0.0]).double().expand(4000, 2)
    found = controllable.inpaint(gaussian(sde), sde, known, torch.tensor([True, False]), 100)
    assert found.dtype == torch.float64 and (found[:, 0] == 0.875).all()
    assert found[:, 1].mean().item() == pytest.approx(-0.3, abs=0.04)
    assert found[:, 1].std().item() == pytest.approx(0.5, rel=0.06)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_colourings_keep_the_grey_and_draw_the_rest(name, monkeypatch):
    """Data with a grey of std 0.6 and two independent colours of std 0.2: drawn so beside any grey."""
    sde, bases = SDES[name](), []
    one = torch.full((3, 3), 1 / 3).double()  # the projection on grey
    cov = 0.36 * one + 0.04 * (torch.eye(3).double() - one)
    data = Correlated(sde, [0.0, 0.0, 0.0], cov.tolist())
    spied(monkeypatch, sb, "imputation", lambda given, _: bases.append(given["basis"]))
    grey = torch.linspace(-0.5, 0.5, 2000).double().view(-1, 1, 1, 1)

    def score(x, t):
        return data(x[..., 0, 0], t)[..., None, None]

    found = controllable.colorize(score, sde, grey, 100)
    assert found.shape == (2000, 3, 1, 1)
    assert_close(found.mean(1, keepdim=True), grey)
    basis, = bases
    assert_close(basis @ basis.mT, torch.eye(3).double(), rtol=0, atol=1e-6)
    assert_close(basis[0], torch.full((3,), 3**-0.5).double(), rtol=1e-6, atol=0)
    colour = (found - grey)[..., 0, 0]
    assert torch.cov(colour.T).sub(0.04 * (torch.eye(3) - one)).abs().max() < 0.006
    assert torch.corrcoef(torch.cat([colour.T, grey.view(1, -1)]))[3, :3].abs().max() < 0.12
    with pytest.raises(ValueError, match="grey: must have one channel"):
        controllable.colorize(score, sde, found, 3)


def test_masks_say_what_is_known():
    masks = controllable.make_masks(12, 20)
    known = {name: mask.double().mean().item() for name, mask in masks.items()}
    assert all(mask.shape == (1, 1, 12, 20) and mask.dtype == torch.bool for mask in masks.values())
    assert known["half"] == 0.5 and masks["half"][..., :10].all()
    assert known["box"] == 0.75 and not masks["box"][0, 0, 3:9, 5:15].any()
    assert torch.equal(masks["border"], ~masks["box"])
    assert 0.2 < known["pixels"] < 0.4
    many = controllable.make_masks(100, 100)["pixels"]
    assert many.double().mean() == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(many, controllable.make_masks(100, 100)["pixels"])
    odd = controllable.make_masks(5, 7)
    for mask in (odd["box"], odd["border"]):
        assert torch.equal(mask, mask.flip(2)) and torch.equal(mask, mask.flip(3))
    assert odd["border"].sum() == 3 * 3 and odd["half"].sum() == 5 * 4


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 4, 12), (1, 28, 28), (3, 7, 9)])
def test_the_classifier_hears_the_time_and_pools_pictures_of_every_size_to_two_by_two(shape):
    """Of 4 x 4 pixels a single one is left, which stands for all four. Its gradient reaches every picture.

    The classifier of the conditional page is the same text.
    """
    net, pooled = controllable.NoisyClassifier(shape[0], 7, 8, 4, patch=2 if shape[1] % 2 == 0 else 1).eval(), []
    for block in (net.block1, net.block2, net.block3):
        torch.nn.init.normal_(block.conv2.weight, std=0.3)
    net.norm_out.register_forward_hook(lambda _, __, out: pooled.append(F.silu(out)))
    net.out.register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
    x = torch.randn(3, *shape, requires_grad=True)
    logits = net(x, torch.tensor([10.0, 10.0, 500.0]))
    assert logits.shape == (3, 7)
    assert_close(pooled[1], F.adaptive_avg_pool2d(pooled[0], 2).flatten(1))
    later = net(x, torch.tensor([500.0, 10.0, 500.0]))
    assert (logits[0] - later[0]).abs().max() > 1e-4
    assert_close(logits[1:], later[1:])
    gradient, = torch.autograd.grad(logits.log_softmax(1)[:, 2].sum(), x)
    assert gradient.isfinite().all() and (gradient.flatten(1).abs().amax(1) > 1e-6).all()
    assert net.double()(x.double(), torch.ones(3)).dtype == torch.float64
