"""experiments/series.py: its network, forecasts from an exact score, spectra."""

import pytest
import torch
from conftest import awake, experiment
from exact_scores import SDES
from torch.testing import assert_close

series = experiment("series")


# The network


def test_the_network_moves_with_its_input_where_padding_is_not_seen():
    """Dilations 1, 2, 4 behind a first 3: eight values see the edge on either side."""
    net = awake(series.SeriesNet(8, 3)).double()
    x, t = torch.randn(2, 1, 64).double(), torch.tensor([0.3, 0.8]).double() * 999
    y, moved = net(x, t), net(x.roll(5, 2), t)
    assert_close(moved[..., 13:-8], y[..., 8:-13], rtol=1e-9, atol=1e-12)
    assert (moved[..., :5] - y.roll(5, 2)[..., :5]).abs().max() > 1e-6
    changed = x.clone()
    changed[..., 32] += 1
    reached = (net(changed, t) - y).abs().amax((0, 1)) > 0
    assert reached[24:41].all() and not reached[:24].any() and not reached[41:].any()
    changed = x.clone()
    changed[..., 0] += 1  # nor does the start reach the end
    assert not ((net(changed, t) - y).abs().amax((0, 1)) > 0)[9:].any()
    dilations = [block.conv1.dilation for block in series.SeriesNet(8, 9).blocks]
    assert dilations[:2] == [(1, 1), (1, 2)] and dilations[-3:] == [(1, 64), (1, 1), (1, 2)]


@pytest.mark.parametrize("sde", ["ve", "vp"])
def test_its_settings_reach_the_network(sde, tmp_path, monkeypatch):
    class Made(Exception):
        pass

    def made(channels, layers, fourier):
        raise Made(channels, layers, fourier)

    monkeypatch.setattr(series, "SeriesNet", made)
    with pytest.raises(Made) as found:
        series.main(f"--device cpu --out {tmp_path} --hidden 24 --layers 3 --sde {sde}".split())
    assert found.value.args == (24, 3, sde == "ve")


# Forecasts


def test_futures_are_those_of_their_own_series():
    """The first axis is the draw, the second the series; each keeps what is known of it."""
    sde, cfg = SDES["vp"](), series.Config(inpaint_N=3, inpaint_corrector=0)
    x = torch.arange(12.0).view(3, 1, 4)
    known = torch.tensor([True, True, False, False]).expand_as(x)
    found = series.futures(cfg, lambda x, t: -x, sde, x, known, 5)
    assert found.shape == (5, 3, 1, 4)
    assert (found[..., :2] == x[..., :2]).all()
    assert found[..., 2:].std(0).min() > 0


@pytest.mark.parametrize("asked, length, horizon", [(0, 128, 32), (0, 3, 1), (5, 20, 5)])
def test_what_is_not_known_is_as_long_as_the_forecast(asked, length, horizon):
    parts = series.unknown_parts(series.Config(forecast=asked), length)
    assert list(parts) == ["forecast", "gap"]
    assert all(known.shape == (1, 1, length) and (~known).sum() == horizon for known in parts.values())
    assert not parts["forecast"][0, 0, -horizon:].any()
    gap = (~parts["gap"][0, 0]).nonzero()[:, 0]
    assert (gap.diff() == 1).all() and abs(gap[0] - (length - 1 - gap[-1])) <= 1  # in the middle


# Spectra


def test_the_spectrum_of_a_wave_is_one_line_and_that_of_noise_is_flat():
    t = torch.arange(64) / 64
    waves = torch.sin(2 * torch.pi * (5 * t + torch.rand(10, 1)))[:, None]
    power = series.spectrum(waves)
    assert power.shape == (33,)
    assert_close(power, torch.zeros(33).index_fill(0, torch.tensor(5), 16.0), rtol=1e-4, atol=1e-4)
    assert_close(series.spectrum(torch.randn(4000, 1, 64)), torch.ones(33), rtol=0.1, atol=0)


def test_autocorrelation_is_that_of_its_definition():
    """About the mean of each series, biased; of silence it is 0."""
    x = torch.randn(6, 1, 9).cumsum(2)
    wanted = torch.zeros(6, 5)
    for i, one in enumerate(x[:, 0] - x[:, 0].mean(1, keepdim=True)):
        for lag in range(5):
            wanted[i, lag] = (one[:9 - lag] * one[lag:]).sum() / (one**2).sum()
    assert_close(series.autocorrelation(x), wanted.mean(0))
    assert series.autocorrelation(torch.zeros(2, 1, 8)).tolist() == [0] * 5


def test_the_spectral_distance_is_in_decibels():
    """The root of the mean of the squares, where frequencies are strengthened by other gains."""
    x = torch.randn(5, 1, 16)
    gains = torch.tensor([1.0, 2.0, 10.0, 0.5, 1.0, 3.0, 1.0, 0.1, 1.0])
    other = torch.fft.irfft(torch.fft.rfft(x) * gains, 16)
    wanted = (20 * gains.log10()).square().mean().sqrt().item()
    assert series.spectral_distance(x, other) == pytest.approx(wanted, rel=1e-3)
    assert series.spectral_distance(other, x) == series.spectral_distance(x, other)
    silent = torch.zeros(3, 1, 32)
    assert series.spectral_distance(silent, silent) == 0
