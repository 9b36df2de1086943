"""What experiments/ddpm.py draws, by what the drawing functions were handed."""

import json
import math

import ddpm_example as ddpm

import pytest
import torch
from conftest import experiment, only_run, open_run, spied
from torch.testing import assert_close

pytestmark = pytest.mark.slow  # the file as a whole

figures = experiment("ddpm")
SMALL = "--dataset", "digits8"


def test_samples_are_of_the_scaled_network_and_the_bound_of_the_network_itself(
        finished, drawings, tmp_path, monkeypatch):
    """The flags of sampling count for both, and the run that was loaded stays as it is."""
    folder, _ = finished(ddpm, *SMALL)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    sampled, bounded = [], []
    monkeypatch.setattr(figures, "is_8bit", lambda x: True)
    spied(monkeypatch, ddpm, "reverse_process", lambda given, _: sampled.append(given))
    spied(monkeypatch, ddpm, "variational_bound", lambda given, _: bounded.append(given))
    figures.main(["--sample", str(folder), "--out", str(tmp_path), "--device", "cpu", "--evaluate", "10",
                  "--eps_scale", "0.9", "--variance", "beta", "--no-clip_x0"])
    (of_samples,), (of_bound,) = sampled, bounded
    xT, t, network = of_samples["xT"][:3], torch.full((3,), 5), of_bound["model"]
    average = torch.load(folder / "checkpoint.pt", weights_only=True)["ema"]
    assert all(torch.equal(value, average[name]) for name, value in network.state_dict().items())
    assert not network.training
    assert_close(of_samples["model"](xT, t), 0.9 * network(xT, t))
    for given in (of_samples, of_bound):
        assert (given["variance"], given["clip_x0"], given["schedule"].T) == ("beta", False, 20)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    found = json.loads((only_run(tmp_path, "ddpm") / "metrics.json").read_text())
    assert found["bits_per_dim"]["images"] == len(of_bound["x0"]) == 10
    way, samples = drawings["denoising.png"], drawings["neighbours.png"]["drawn"]
    assert way["row_labels"] == ["x_t", "x0_hat"] * 3 and len(samples) == 12
    assert way["column_labels"] == [f"t = {t}" for t in (20, 17, 15, 12, 9, 6, 4, 1)]
    for k in range(3):  # the last x0_hat is x_0 itself: the last step adds no noise
        assert torch.equal(way["rows"][2 * k][0], of_samples["xT"][k])
        assert_close(way["rows"][2 * k + 1][-1], samples[k], rtol=1e-3, atol=1e-3)


def test_the_bound_is_of_8_bit_images_alone(finished, drawings, tmp_path, capsys):
    """Pictures of digits8 have 17 levels of grey."""
    figures.main(["--sample", str(finished(ddpm, *SMALL)[0]), "--out", str(tmp_path), "--device", "cpu"])
    assert "bound.png" not in drawings and "no bound: --dataset digits8" in capsys.readouterr().out


@pytest.mark.parametrize("argv", [[], ["--no-clip_x0"]])
def test_x0_hat_on_the_way_is_that_of_the_sampler(argv, drawings, tmp_path):
    """The mean of the next step is that of q given this x0_hat (Eq. 7), at the last step x0_hat itself."""
    cfg, run, data = open_run(ddpm, tmp_path, "--T", 8, *SMALL, *argv)
    schedule = ddpm.make_schedule("linear", cfg.T)

    def eps_model(xt, t):
        return 0.3 * xt

    xT = torch.randn(3, *data.shape)
    states = list(ddpm.reverse_process(eps_model, xT, schedule, cfg.variance, cfg.clip_x0))
    figures.figure_denoising(run, cfg, eps_model, states, schedule)
    rows = drawings["denoising.png"]["rows"]
    for i, (t, xt) in enumerate(states[:-1]):
        mean, _ = ddpm.p_theta(eps_model, xt, t, schedule, cfg.variance, cfg.clip_x0)
        for k in range(3):
            assert torch.equal(rows[2 * k][i], xt[k])
            wanted, _ = ddpm.q_posterior(rows[2 * k + 1][i], xt[k], t, schedule)
            assert_close(wanted[0], mean[k], rtol=1e-3, atol=1e-3)


def test_rate_and_distortion_belong_to_the_bound(drawings, tmp_path):
    """Fig. 5: the rate at t is the bits of all later terms; x0_hat of a blind network is known."""
    cfg, run, data = open_run(ddpm, tmp_path, *SMALL, "--no-clip_x0", "--T", 100, "--evaluate", 180)
    schedule = ddpm.make_schedule("linear", 100)
    figures.figure_bound(run, cfg, lambda x, t: 0 * x, data, schedule)
    found, parts = run.read_metrics()["bits_per_dim"], drawings["rate_distortion.png"]["parts"]
    assert [part["xlabel"] for part in parts] == ["t", "t", "bits / dimension"]
    (ts, distortion, _), (every_t, rate, _), both = (part["lines"]["_"] for part in parts)
    assert list(every_t) == list(range(1, 101))
    assert {1, 2, 3, 5, 8, 13, 100} <= set(ts) and list(ts) == sorted(ts) and len(ts) < 60
    assert both[:2] == ([rate[t - 1] for t in ts], distortion)
    (_, L), = drawings["bound.png"]["parts"][0]["lines"].values()  # L_1 to L_{T-1}
    assert_close([rate[0], rate[4], rate[-1]], [found["rate"], sum(L[4:]) + found["L_T"], found["L_T"]])
    for t, error in zip(ts, distortion, strict=True):  # x0_hat - x0 = eps / sqrt(snr)
        a = schedule.alpha_bars[t].item()
        assert_close(error, 127.5 * math.sqrt((1 - a) / a), rtol=0.035, atol=0)


def test_the_forward_figure_goes_both_ways(drawings, tmp_path, monkeypatch):
    """Eq. 2 iterated and Eq. 4 at once: different noise, one distribution."""
    cfg, run, data = open_run(ddpm, tmp_path)
    schedule, steps = ddpm.make_schedule("linear", 100), []
    spied(monkeypatch, ddpm, "q_step", lambda given, out: steps.append((given, out)))
    figures.figure_forward(run, data, schedule)
    rows, ts = drawings["forward.png"]["rows"], [0, 5, 10, 20, 30, 50, 75, 100]
    assert drawings["forward.png"]["row_labels"] == ["Eq. 2, t times", "Eq. 4, once"] * 2
    assert drawings["forward.png"]["column_labels"] == [f"t = {t}" for t in ts]
    for i, row in enumerate(rows):
        for t, xt in zip(ts, row, strict=True):
            a, x0 = schedule.alpha_bars[t], data.test[i // 2]
            assert_close((xt - a.sqrt() * x0).std(), (1 - a).sqrt(), rtol=0.13, atol=1e-6)
    assert (rows[0][3] - rows[1][3]).abs().max() > 0.1
    assert [given["t"] for given, _ in steps] == list(range(1, 101))
    assert torch.equal(steps[0][0]["x_prev"], data.test[:2])
    for (_, out), (given, _) in zip(steps[:-1], steps[1:], strict=True):
        assert given["x_prev"] is out  # a chain
    for k, t in enumerate(ts[1:], 1):
        assert torch.equal(torch.stack([rows[0][k], rows[2][k]]), steps[t - 1][1])


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_schedules_stand_beside_the_weights_of_the_bound(variance, drawings, tmp_path):
    cfg, run, _ = open_run(ddpm, tmp_path, *SMALL, "--T", 1000, "--variance", variance)
    figures.figure_schedules(run, cfg)
    signal, log_snr, weight = drawings["schedules.png"]["parts"]
    for kind in ("linear", "cosine"):
        schedule = ddpm.make_schedule(kind, 1000)
        a = schedule.alpha_bars[1:]
        assert torch.equal(signal["lines"][kind][1], a)
        assert_close(log_snr["lines"][f"_{kind}"][1], (a / (1 - a)).log())
        t, weights = weight["lines"][f"_{kind}"]
        assert t[0] == 2 and torch.isfinite(weights).all()  # at 1 beta_tilde is 0
        assert_close(weights[498], ddpm.bound_weight(500, schedule, variance))
    assert ("tilde" in weight["title"]) == (variance == "beta_tilde")
