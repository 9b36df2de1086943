"""What the conditional page and its experiments draw, measure and refuse.

Pictures are of one grey each, that of their class. A stand-in for the sampler leaves what it was asked for
in the picture: x_T + 100 w + 10000 y.
"""

import json
import signal

import common.data
import conditional_diffusion_example as cond
from common.data import Data
from common.run import Run
from experiments import compare, guidance
from experiments import conditional as figures

import pytest
import torch
from conftest import only_run, open_run, spied
from torch.testing import assert_close

pytestmark = pytest.mark.slow  # the file as a whole

TRUE_PROCESS = cond.guided_process

@pytest.fixture(scope="module")
def coded():
    """Pictures of one grey each, that of their class; the classes come in no order."""
    def part(n):
        y = torch.randperm(n, generator=torch.Generator().manual_seed(n)) % 10
        return (y / 5 - 0.9).view(-1, 1, 1, 1).expand(n, 1, 8, 8).contiguous(), y

    (train, train_labels), (test, test_labels) = part(300), part(30)
    return Data("coded", train, test, train_labels, test_labels, tuple("abcdefghij"))


def class_of(pictures):
    """The class of each coded picture."""
    return (5 * (pictures.flatten(1).mean(1) + 0.9)).round().long().tolist()


def asked_of(samples):
    """The class that the stand-in was asked for in each sample."""
    return (samples / 10_000).flatten(1).mean(1).round().long().tolist()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, coded):
    """(folder of a run on the coded pictures, the pictures and labels that its loss was given)."""
    pairs = []
    with pytest.MonkeyPatch.context() as patch:
        spied(patch, cond, "v_loss", lambda given, _: pairs.extend(
            zip(class_of(given["x0"]), given["model"].keywords["y"].tolist(), strict=True)))
        cfg, run, _ = open_run(cond, tmp_path_factory.mktemp("trained"), "--preview_every", 100, "--T", 8,
                               "--p_uncond", 0.3, "--batch_size", 32, "--steps", 3)
        run.load(coded)
        cond.train(cfg, run, coded)
    return run.folder, pairs


@pytest.fixture
def shown(trained, coded, drawings, tmp_path, monkeypatch):
    """shown(main, *flags): (drawings, metrics, calls of the sampler) of main --sample.

    config: values of the checkpoint's Config in place of its own.
    """
    calls = []

    def guided_process(cfg, model, xT, schedule, y, w, classifier=None):
        calls.append((cfg, model, xT, y.tolist(), w, classifier))
        yield 0, xT + 100 * w + 10_000 * y.view(-1, 1, 1, 1)

    for script in (cond, figures):
        monkeypatch.setattr(script, "load_images", lambda *_: coded)
    monkeypatch.setattr(cond.quality, "load_judge", lambda *_, **__: (None, {}))
    monkeypatch.setattr(cond, "guided_process", guided_process)

    def run(main, *flags, **config):
        state = torch.load(trained[0] / "checkpoint.pt", weights_only=True)
        torch.save(state | {"config": state["config"] | config}, tmp_path / "copy.pt")
        main(["--sample", str(tmp_path / "copy.pt"), "--out", str(tmp_path / "out"), "--device", "cpu",
              *map(str, flags)])
        metrics = only_run(tmp_path / "out", "conditional") / "metrics.json"
        return drawings, json.loads(metrics.read_text()), calls
    return run


# Labels in training


def test_each_picture_is_trained_with_its_label_or_with_none(trained):
    _, pairs = trained
    assert all(label in (true, 10) for true, label in pairs) and len(pairs) == 96
    assert 10 < sum(label == 10 for _, label in pairs) < 50


def test_the_noisy_classifier_is_trained_with_the_label_of_each_picture(coded, tmp_path, monkeypatch):
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    true, asked = [], []
    spied(monkeypatch, cond, "q_sample", lambda given, _: true.extend(class_of(given["x0"])))
    spied(monkeypatch, cond.F, "cross_entropy", lambda given, _: asked.extend(given["target"].tolist()))
    cfg, run, _ = open_run(cond, tmp_path, "--classifier_steps", 1)
    cond.train_classifier(cfg, run, coded, cond.make_schedule("linear", 20))
    assert true == asked and len(set(asked)) == 10
    assert len(list((tmp_path / "cache").iterdir())) == 1  # kept for the next run


# What the labels of the figures say


def check_grid(grid, calls, classes):
    """Each column is one noise and class, each row one weight: -1, 0 and 3."""
    assert grid["row_labels"] == ["unconditional", "w = 0", "w = 3"]
    assert grid["column_labels"] == ["abcdefghij"[c] for c in classes]
    xT = next(xT for _, _, xT, y, w, _ in calls if w == -1)
    for w, row in zip((-1, 0, 3), grid["rows"], strict=True):
        assert_close(row, xT + 100 * w + 10_000 * torch.tensor(classes).view(-1, 1, 1, 1), rtol=0, atol=0.01)


def test_asked_for_classes_stand_in_their_order_above_real_ones(shown):
    drawn, metrics, calls = shown(cond.main, "--w", -1, 0, 3, "--classes", 3, 1, 4, 1, 5, "--w_samples", 0.5)
    (samples, real), table = drawn["samples.png"]["rows"], drawn["samples.png"]
    assert table["row_labels"] == ["w = 0.5", "real"] and table["column_labels"] == ["d", "b", "e", "b", "f"]
    *_, (_, film) = drawn["denoising.gif"]["states"]
    assert asked_of(samples) == class_of(real) == asked_of(film) == [3, 1, 4, 1, 5] and metrics["sampling"]["n"] == 5
    check_grid(drawn["grid.png"], calls, [3, 1, 4, 1, 5])


def test_samples_of_all_classes_stand_by_class_beside_held_out_pictures(shown):
    drawn, _, _ = shown(cond.main, "--n_samples", 30, "--w_samples", 0.5, "--S", 3)
    (name, samples), (of_real, real) = drawn["samples.png"]["parts"]
    assert (name, of_real, drawn["samples.png"]["columns"]) == ("3 DDIM steps, w = 0.5", "real, held out", 3)
    assert class_of(real) == asked_of(samples) == [c for c in range(10) for _ in range(3)]
    assert "grid.png" not in drawn


def test_the_experiment_draws_every_class_from_the_same_noises_by_the_average(shown, trained):
    drawn, _, calls = shown(figures.main, "--w", -1, 0, 3, "--w_samples", 0.5)
    check_grid(drawn["grid.png"], calls, [*range(10)])
    table = drawn["same_noise.png"]
    assert table["row_labels"] == [f"noise {i}" for i in (1, 2, 3, 4, 5)]
    assert table["column_labels"] == list("abcdefghij")
    noises = [row - 50 - 10_000 * torch.arange(10).view(-1, 1, 1, 1) for row in table["rows"]]
    for noise, other in zip(noises, noises[1:] + noises[:1], strict=True):
        assert_close(noise, noise[:1].expand_as(noise), rtol=0, atol=0.05)
        assert (noise - other).abs().max() > 1
    assert asked_of(drawn["neighbours.png"]["drawn"] - 50) == [*range(10), 0, 1]
    average = torch.load(trained[0] / "checkpoint.pt", weights_only=True)["ema"]
    for _, model, *_ in calls:
        assert not model.training
        assert all(torch.equal(value, average[name]) for name, value in model.state_dict().items())
    assert "classifier.png" not in drawn


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_the_scale_of_classifier_guidance_is_1_plus_w(sampler, shown, monkeypatch):
    """The classifier is the one that was trained, the clamp comes before its push."""
    classifier, used = cond.NoisyClassifier(1, 10, 8, 4).eval().requires_grad_(False), []
    monkeypatch.setattr(cond, "guided_process", TRUE_PROCESS)
    monkeypatch.setattr(cond, "train_classifier", lambda *_: classifier)
    spied(monkeypatch, cond, "classifier_guided_eps", lambda given, _: used.append(given))
    drawn, _, _ = shown(cond.main, "--guidance", "classifier", "--sampler", sampler, "--variance", "beta",
                        "--w", -1, 0, 3, "--w_samples", 0.5, "--classes", 3)
    alphas, scales = cond.make_schedule("linear", 8).alphas, []
    for given in used:  # of Alg. 1 with sigma^2 = beta: s sqrt(alpha)
        factor = 1 if sampler == "ddim" else alphas[given["t"][0]].sqrt()
        scales.append(round(float(given["s"].flatten()[0] / factor), 3))
        assert isinstance(given["model"], cond.ClippedModel) and given["classifier"] is classifier
    assert list(dict.fromkeys(scales)) == [1.5, 0, 1, 4]
    assert drawn["grid.png"]["row_labels"] == ["unconditional", "s = 1", "s = 4"]


@pytest.mark.parametrize("loop", ["model", "classifier"])
def test_after_ctrl_c_nothing_is_drawn_with_an_unfinished_classifier(loop, tmp_path, monkeypatch, capsys):
    """Ctrl-C comes in the second step of a loop."""
    steps = Run.steps

    def interrupted(run, count, name="model", *args, **kwargs):
        for step in steps(run, count, name, *args, **kwargs):
            yield step
            if name == loop and step == 1:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Run, "steps", interrupted)
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    cond.main(["--preset", "smoke", "--dataset", "digits8", "--guidance", "classifier", "--device", "cpu",
               "--out", str(tmp_path), "--preview_every", "100"])
    folder = only_run(tmp_path, "conditional")
    assert {file.name for file in folder.iterdir()} == {"config.json", "log.csv", "metrics.json", "checkpoint.pt"}
    assert "no classifier to guide the samples; --resume goes on" in capsys.readouterr().out
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == (2 if loop == "model" else 6)
    assert not (tmp_path / "cache").exists()


# The sweep, and both networks


@pytest.mark.parametrize("p_uncond, kinds", [
    (0.1, {"classifier-free": "classifier_free", "classifier: null class": "classifier"}),
    (1.0, {"classifier: unconditional": "classifier"})])
def test_guidance_is_measured_at_every_weight(p_uncond, kinds, shown, monkeypatch):
    """Of each kind of guidance; an unconditional network has but one."""
    noised, calls, number = [], [], {"classifier_free": 1.0, "classifier": 2.0}

    def classifier(xt, t):  # right up to t = 4, then never
        y = torch.tensor(class_of(noised[-1]))
        return torch.nn.functional.one_hot((y + (t > 4)) % 10, 10).float()

    def quality(run, states, model, steps, data, labels):
        *_, (_, x) = states(range(5, 105))
        assert asked_of(x) == [i % 10 for i in range(5, 105)] and labels.tolist() == [i % 10 for i in range(120)]
        w = (x - 10_000 * (torch.arange(5, 105) % 10).view(-1, 1, 1, 1)).mean().item() / 100
        return {"n": 120, "accuracy": round(w), "accuracy_of_held_out": 0.9, "recall": steps,
                "frechet_distance": number[calls[-1].guidance], "frechet_distance_of_held_out": 1.0}

    spied(monkeypatch, cond, "q_sample", lambda given, _: noised.append(given["x0"]))
    monkeypatch.setattr(cond, "train_classifier", lambda *_: classifier)
    monkeypatch.setattr(Run, "quality", quality)
    spied(monkeypatch, cond, "guided_process", lambda given, _: calls.append(given["cfg"]))
    drawn, metrics, sampled = shown(figures.main, "--guidance", "classifier", "--w", 7, 3, "--evaluate", 120, "--S", 4,
                                    p_uncond=p_uncond)
    sweep = metrics["guidance_sweep"]
    assert {name: {w: (row["accuracy"], row["frechet_distance"], row["recall"]) for w, row in rows.items()}
            for name, rows in sweep.items()} == {
        name: {f"{w}": (w, number[guidance], 4) for w in (-1, 0, 2, 3, 7)} for name, guidance in kinds.items()}
    assert metrics["evaluation"] == list(sweep.values())[-1]["2"]  # w_samples, with the guidance of the flags
    lines = drawn["guidance.png"]["parts"][0]["lines"]
    assert lines == {name: ([-1, 0, 2, 3, 7], [-1, 0, 2, 3, 7], "o-") for name in kinds}
    (right,) = drawn["classifier.png"]["parts"]
    assert right["lines"]["noisy classifier"][:2] == (list(range(1, 9)), [float(t <= 4) for t in range(1, 9)])
    assert right["levels"] == {"by chance": 0.1}
    assert all(call[-1] is classifier for call in sampled)


def test_the_sweep_wants_a_network_with_a_null_class(shown, capsys):
    with pytest.raises(SystemExit):
        shown(figures.main, "--guidance", "none", "--evaluate", 10, p_uncond=0.0)
    said = capsys.readouterr().err
    assert "--evaluate 10" in said and "null class" in said


def test_guidance_is_drawn_of_both_evaluations(drawings, tmp_path):
    for file, name, accuracy in (("evaluation", "one", 0.5), ("evaluation_unconditional", "other", 0.7)):
        row = {"n": 8, "accuracy": accuracy, "accuracy_of_held_out": 0.9, "recall": 0.6, "frechet_distance": 9.0,
               "frechet_distance_of_held_out": 1.0}
        rows = {"-1": row, "2": row | {"recall": 0.3, "frechet_distance": 4.0}}
        (tmp_path / f"{file}.json").write_text(json.dumps({"guidance_sweep": {name: rows}}))
    guidance.main(tmp_path)
    accuracy, recall, distance = drawings["guidance.png"]["parts"]
    ws = [-1.0, 2.0]
    assert drawings["guidance.png"]["title"] == "8 samples per point"
    assert accuracy["lines"] == {"one": (ws, [0.5, 0.5], "o-"), "other": (ws, [0.7, 0.7], "o-")}
    assert recall["lines"] == {name: (ws, [0.6, 0.3], "o-") for name in ("_one", "_other")}
    assert distance["lines"] == {name: (ws, [9.0, 4.0], "o-") for name in ("_one", "_other")}
    assert [part["levels"] for part in (accuracy, recall, distance)] == [{"held out": 0.9}, {}, {"_held out": 1.0}]


def test_compare_trains_both_networks_for_the_same_time_and_draws_as_asked(coded, drawings, tmp_path, monkeypatch):
    """Every flag of the sampler reaches both, and both begin with the same noises."""
    asked, costs, scores = [], iter([{"seconds": 0.05}, {"seconds": 0.04}]), iter([(3.0, 0.25), (8.0, 0.75)])

    def guided_process(cfg, model, xT, schedule, y, w, classifier):
        asked.append((cfg, type(model.network), xT, y.tolist(), w))
        yield 0, xT + (1000 if cfg.backbone == "dit" else 0) + 10_000 * y.view(-1, 1, 1, 1)

    def scored(x, data, labels):
        assert asked_of(x) == labels.tolist() == [3, 7]
        return dict(zip(("frechet_distance", "accuracy"), next(scores), strict=True))

    monkeypatch.setattr(compare, "load_images", lambda *_: coded)
    monkeypatch.setattr(compare, "training_cost", lambda *_, **__: next(costs))
    monkeypatch.setattr(compare.quality, "scores", scored)
    monkeypatch.setattr(cond, "guided_process", guided_process)
    compare.main(["--preset", "smoke", "--seconds", "0.5", "--preview_every", "1000", "--device", "cpu", "--out",
                  str(tmp_path), "--sampler", "ancestral", "--variance", "beta", "--guidance", "none", "--no-clip_x0",
                  "--classes", "3", "7", "--w_samples", "3"])
    folder = only_run(tmp_path, "conditional")
    found = json.loads((folder / "metrics.json").read_text())["compare"]
    assert {name: (row["steps"], row["frechet_distance"]) for name, row in found.items()} == {
        "unet": (10, 3.0), "dit": (12, 8.0)}
    assert [(cfg.backbone, network) for cfg, network, *_ in asked] == [("unet", cond.UNet), ("dit", cond.DiT)]
    for cfg, _, xT, y, w in asked:
        assert (cfg.sampler, cfg.variance, cfg.guidance, cfg.clip_x0) == ("ancestral", "beta", "none", False)
        assert (y, w) == ([3, 7], 3.0) and torch.equal(xT, asked[0][2])
    unet, dit = drawings["compare.png"]["parts"]
    assert [unet[0], dit[0]] == ["unet: 10 steps, Fréchet 3.0, right 25%", "dit: 12 steps, Fréchet 8.0, right 75%"]
    assert_close(dit[1] - unet[1], torch.full_like(unet[1], 1000.0), rtol=0, atol=0.05)
    for name, block in (("unet", "network.mid1.conv1.weight"), ("dit", "network.blocks.1.condition.weight")):
        state = torch.load(folder / name / "checkpoint.pt", weights_only=True)  # runs of the page
        assert "seconds" not in state["config"] and state["config"]["backbone"] == name and block in state["ema"]
        assert state["step"] == found[name]["steps"]
