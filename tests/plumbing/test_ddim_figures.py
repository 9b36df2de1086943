"""What experiments/ddim.py draws: each row, column and line is what its label says.

Stand-ins for the samplers leave what they were asked for in the picture: x_T + 10 S + 1000 eta.
"""

import json

import ddim_example as ddim
import ddpm_example as ddpm
from common.run import Run
from common.run import open_run as open_any_run

import pytest
import torch
from conftest import experiment, only_run, open_run
from torch.testing import assert_close

pytestmark = pytest.mark.slow  # the file as a whole

figures = experiment("ddim")
SIGMA_HAT = 50_000.0


@pytest.fixture(scope="module")
def of_ddpm(finished):
    """The folder of a run of DDPM."""
    return finished(ddpm, "--dataset", "digits8")[0]


def test_a_ddpm_checkpoint_brings_its_network_and_ddim_its_sampler(of_ddpm, tmp_path):
    """Fields that DDPM does not have are DDIM's own; the network and its weights are DDPM's."""
    argv = ["--sample", str(of_ddpm), "--eta", "0.5", "--out", str(tmp_path)]
    cfg, run = open_any_run("ddim", ddim.Config, ddim.PRESETS, ddim.SAMPLING, argv, reads=("ddpm",))
    assert (cfg.T, cfg.channels, cfg.groups) == (20, 8, 4)
    assert (cfg.S, cfg.eta, cfg.n_samples) == (5, 0.5, 4)  # of ddim's smoke preset, and the flag
    stored = torch.load(of_ddpm / "checkpoint.pt", weights_only=True)
    for name, value in run.trained(ddim.make_unet(cfg, (1, 8, 8))).state_dict().items():
        assert torch.equal(value, stored["ema"][name])


@pytest.fixture
def shown(of_ddpm, drawings, tmp_path, monkeypatch):
    """shown(*flags): (drawings, metrics, {stand-in: the settings of each call}) of the experiment."""
    asked = {"sampler": [], "sigma_hat": [], "encoder": []}

    def ddim_process(model, xT, schedule, S, eta, spacing, clip_x0):
        asked["sampler"].append((model, eta, spacing, clip_x0))
        yield 0, xT + 10 * S + 1000 * eta

    def sigma_hat_process(model, xT, schedule, S, spacing, clip_x0):
        asked["sigma_hat"].append((model, spacing, clip_x0))
        yield 0, xT + 10 * S + SIGMA_HAT

    def ddim_invert(model, x0, schedule, S, spacing):
        asked["encoder"].append((model, spacing))
        return x0 + S

    def quality(run, states, network, steps, data):
        *_, (_, x) = states(range(100))
        return {"frechet_distance": round(x.mean().item()), "frechet_distance_of_held_out": 7.0, "steps": steps}

    for stand_in in (ddim_process, sigma_hat_process, ddim_invert):
        monkeypatch.setattr(ddim, stand_in.__name__, stand_in)
    monkeypatch.setattr(Run, "quality", quality)

    def run(*flags):
        figures.main(["--sample", str(of_ddpm), "--S", "7", "--spacing", "quadratic", "--eps_scale", "0.9",
                      "--no-clip_x0", "--evaluate", "12", "--out", str(tmp_path), "--device", "cpu", *flags])
        return drawings, json.loads((only_run(tmp_path, "ddim") / "metrics.json").read_text()), asked

    return run


def test_the_rows_have_the_steps_the_noise_and_the_network_of_their_labels(shown):
    """The scaled network for samples, the network itself for codes; flags of sampling count everywhere."""
    drawn, _, asked = shown()
    xT, t, network = torch.randn(3, 1, 8, 8), torch.full((3,), 5), asked["encoder"][0][0]
    assert isinstance(network, ddim.UNet) and not network.training
    decoders = [settings for settings in asked["sampler"] if settings[0] is network]
    assert len(decoders) == len(asked["encoder"]) == 1  # T = 20 has S = 10 alone
    for model, *_ in asked["sampler"] + asked["sigma_hat"]:
        assert_close(model(xT, t), (1.0 if model is network else 0.9) * network(xT, t))
    assert {settings[-2:] for settings in asked["sampler"] + asked["sigma_hat"]} == {("quadratic", False)}
    assert {spacing for _, spacing in asked["encoder"]} == {"quadratic"}

    steps, eta = drawn["steps.png"], drawn["eta.png"]
    assert steps["row_labels"] == ["S = 5", "S = 10", "S = 20"]
    for S, row in zip((5, 10, 20), steps["rows"], strict=True):
        assert_close(row - 10 * S, steps["rows"][0] - 50, rtol=0, atol=1e-3)  # eta = 0, the same noises
    assert eta["row_labels"] == ["eta = 0", "eta = 0.2", "eta = 0.5", "eta = 1"]
    assert eta["column_labels"][:4] == ["noise 1", "again", "noise 2", "again"]
    for value, row in zip((0, 0.2, 0.5, 1), eta["rows"], strict=True):
        noise = row - 70 - 1000 * value
        assert_close(noise, eta["rows"][0] - 70, rtol=0, atol=1e-3)
        assert torch.equal(row[0::2], row[1::2]) and len(row) == len(eta["column_labels"])
        assert abs(noise.std() - 1) < 0.25 and len(noise[:, 0, 0, 0].unique()) == 5


def test_one_interpolates_between_noises_on_the_sphere_and_on_the_line(shown):
    drawn, _, _ = shown()
    way, film = drawn["interpolation.png"], drawn["interpolation.gif"]
    u = torch.tensor([float(label.removeprefix("u = ")) for label in way["column_labels"]]).view(-1, 1, 1, 1)
    assert [label.split(":")[0] for label in way["row_labels"]] == ["slerp", "line"] * 2
    for k in (0, 2):
        slerp, line = (row - 70 for row in way["rows"][k:k + 2])  # S = 7, eta = 0
        a, b = line[:1], line[-1:]
        assert_close(line, (1 - u) * a + u * b, rtol=0, atol=0.03)  # u has two digits
        assert_close(slerp, ddim.slerp(a.expand(9, -1, -1, -1), b.expand(9, -1, -1, -1), u), rtol=0, atol=0.05)
        for row, label in zip((slerp, line), way["row_labels"][k:k + 2], strict=True):
            assert f"\n{row[4].std():.2f} in" in label
    frames = [frame - 70 for frame in film["frames"]]
    for i, (frame, caption) in enumerate(zip(frames, film["captions"], strict=True)):
        start, end, step = i // 12, (i // 12 + 1) % 3, i % 12
        assert caption == f"x_T from noise {start + 1} to {end + 1}, {step / 12:.0%}"
        assert_close(frame, ddim.slerp(frames[12 * start], frames[12 * end], step / 12), rtol=0, atol=1e-3)


def test_reconstructions_stand_beside_their_images_and_codes(shown, drawings, tmp_path):
    """Encoded (S is added), then decoded (10 S is added); the error is of pixels in [0, 1]."""
    cfg, run, data = open_run(ddim, tmp_path, "--T", 60, "--dataset", "digits8")
    figures.figure_reconstruction(run, cfg, None, ddim.make_schedule("linear", 60), data)
    table, errors = drawings["reconstruction.png"], {S: (11 * S / 2) ** 2 for S in (10, 20, 50)}
    (x0, *again, first, last, noise), labels = table["rows"], table["row_labels"]
    assert [label.split("\n")[0] for label in labels] == [
        "held out", "back, S = 10", "back, S = 20", "back, S = 50", "x_T, S = 10", "x_T, S = 50", "N(0, I)"]
    assert [float(label.split("error ")[1]) for label in labels[1:4]] == pytest.approx(list(errors.values()))
    assert list(run.read_metrics()["reconstruction_error_by_S"].values()) == pytest.approx(list(errors.values()))
    assert torch.equal(x0, data.test[:8])
    for S, row in zip(errors, again, strict=True):
        assert_close(row, x0 + 11 * S)
    assert_close(first, x0 + 10)
    assert_close(last, x0 + 50)
    assert abs(noise.std() - 1) < 0.2
    assert all(label.endswith(f"std {code.std():.2f}") for label, code in zip(labels[4:], (first, last, noise), strict=True))


@pytest.mark.parametrize("flags, of_samples", [
    ([], 70), (["--eta", "0.5"], 570), (["--eta", "1", "--sigma_hat"], 70 + SIGMA_HAT)])
def test_the_sweep_scores_three_samplers_by_their_steps(flags, of_samples, shown):
    """Whatever sampler the flags ask for, which is that of the samples."""
    drawn, metrics, _ = shown(*flags)
    samples, (part,) = drawn["neighbours.png"]["drawn"], drawn["quality.png"]["parts"]
    assert abs(samples.mean() - of_samples) < 1 and len(samples) == 12
    wanted = {"eta = 0": [100, 200], "eta = 1": [1100, 1200], "sigma_hat": [SIGMA_HAT + 100, SIGMA_HAT + 200]}
    assert {name: (x, y) for name, (x, y, _) in part["lines"].items()} == {
        name: ([10, 20], distances) for name, distances in wanted.items()}
    assert part["levels"] == {"held out": 7.0}
    for name, rows in metrics["evaluation_by_S"].items():
        assert {S: (row["steps"], row["frechet_distance"]) for S, row in rows.items()} == {
            "10": (10, wanted[name][0]), "20": (20, wanted[name][1])}
