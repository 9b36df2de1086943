"""experiments/controllable.py: completing and colouring from exact scores, masks, the noisy classifier."""

import sys

import score_based_diffusion_example as sb

import pytest
import torch
from conftest import ROOT, spied
from exact_scores import SDES, Correlated, gaussian
from torch.testing import assert_close

sys.path.append(str(ROOT / "experiments"))
import controllable  # noqa: E402


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_independent_dimensions_are_completed_as_they_are_drawn(name):
    """Then the method is exact. What is known is kept to the last bit, in its own dtype."""
    sde = SDES[name]()
    known = torch.tensor([0.875, 0.0]).double().expand(4000, 2)
    found = controllable.inpaint(gaussian(sde), sde, known, torch.tensor([True, False]), 200)
    assert found.dtype == torch.float64 and (found[:, 0] == 0.875).all()
    assert found[:, 1].mean().item() == pytest.approx(-0.3, abs=0.04)
    assert found[:, 1].std().item() == pytest.approx(0.5, rel=0.06)


def test_the_predictor_and_the_correctors_of_the_config_complete():
    """cfg says which predictor, how many corrector steps and of which ratio."""
    sde, seen = SDES["vp"](), []
    cfg = controllable.Config(predictor="flow", inpaint_corrector=3, inpaint_snr=0.3)
    predictor, correctors = controllable.settings(cfg)
    assert predictor is sb.flow_step and len(correctors) == 3
    x, torch_state = torch.randn(5, 2), torch.get_rng_state()
    found = correctors[0](lambda x, t: -x, x, 0.5, 0.9)
    torch.set_rng_state(torch_state)
    assert_close(found, sb.langevin_step(lambda x, t: -x, x, 0.5, 0.9, 0.3), rtol=0, atol=0)

    def correct(score, x, t, alpha):
        seen.append(t)
        return x

    controllable.inpaint(lambda x, t: -x, sde, x, x > 0, 7, predictor, [correct] * 2)
    assert len(seen) == 14


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_colourings_keep_the_grey_and_draw_the_rest(name, monkeypatch):
    """Data with a grey of std 0.6 and two independent colours of std 0.2: drawn so beside any grey."""
    sde, bases = SDES[name](), []
    one = torch.full((3, 3), 1 / 3).double()  # the projection on grey
    cov = 0.36 * one + 0.04 * (torch.eye(3).double() - one)
    data = Correlated(sde, [0.0, 0.0, 0.0], cov.tolist())
    spied(monkeypatch, sb, "imputation", lambda given, _: bases.append(given["basis"]))
    grey = torch.linspace(-0.5, 0.5, 3000).double().view(-1, 1, 1, 1)

    def score(x, t):
        return data(x[..., 0, 0], t)[..., None, None]

    found = controllable.colorize(score, sde, grey, 200)
    assert found.shape == (3000, 3, 1, 1)
    assert_close(found.mean(1, keepdim=True), grey)
    basis, = bases
    assert_close(basis @ basis.mT, torch.eye(3).double(), rtol=0, atol=1e-6)
    assert_close(basis[0], torch.full((3,), 3**-0.5).double(), rtol=1e-6, atol=0)
    colour = (found - grey)[..., 0, 0]
    assert torch.cov(colour.T).sub(0.04 * (torch.eye(3) - one)).abs().max() < 0.006
    assert torch.corrcoef(torch.cat([colour.T, grey.view(1, -1)]))[3, :3].abs().max() < 0.08


def test_colouring_needs_grey():
    with pytest.raises(ValueError, match="grey: must have one channel"):
        controllable.colorize(lambda x, t: -x, sb.VPSDE(), torch.zeros(2, 3, 4, 4), 3)


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


@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 28, 28), (3, 7, 9), (1, 30, 18)])
def test_the_classifier_takes_any_size_and_hears_the_time(shape):
    patch = 2 if shape[1] % 2 == 0 else 1
    net = controllable.NoisyClassifier(shape[0], 7, patch=patch).eval()
    for block in (net.block1, net.block2, net.block3):
        torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x = torch.randn(3, *shape)
    a, b = (net(x, torch.full((3,), t)) for t in (10.0, 500.0))
    assert a.shape == (3, 7) and (a - b).abs().max() > 1e-4
