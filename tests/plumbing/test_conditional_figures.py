"""What the conditional page and its experiments draw, measure and refuse."""

import json
import signal
from itertools import groupby

import common.data
import conditional_diffusion_example as cond
from common import plotting
from common.data import Data, load_images
from experiments import compare, guidance
from experiments import conditional as figures

import pytest
import torch
from conftest import only_run, open_picture, open_run, spied
from torch.testing import assert_close


@pytest.fixture(scope="module")
def coded():
    """Pictures of one grey each, that of their class; the classes come in no order."""
    def part(n):
        y = torch.randperm(n, generator=torch.Generator().manual_seed(n)) % 10
        return (y / 5 - 0.9).view(-1, 1, 1, 1).expand(n, 1, 8, 8).contiguous(), y

    (train, train_labels), (test, test_labels) = part(300), part(30)
    return Data("coded", train, test, train_labels, test_labels, tuple("abcdefghij"))


def train_on(data, out, *flags):
    """The folder of a smoke run on these pictures, and its averaged network."""
    cfg, run, _ = open_run(cond, out, "--preview_every", 100, *flags)
    run.load(lambda: data)
    return run.folder, cond.train(cfg, run, data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, coded):
    """The folder of a smoke run on the coded pictures, and its averaged network."""
    return train_on(coded, tmp_path_factory.mktemp("trained"))


class Pictures:
    """Stands in for `plotting`: notes what would be drawn, {name of the file: arguments}."""

    def __init__(self):
        self.drawn = {}

    def __getattr__(self, name):
        if name == "loss_curve":
            return plotting.loss_curve

        def note(*args, **_):
            self.drawn[args[0].name] = args[1:]
            if name == "denoising":
                list(args[1])
        return note


@pytest.fixture
def drawing(trained, coded, tmp_path, monkeypatch):
    """main --sample of that run with some flags: (figures, calls of each sampler, run folder)."""
    def draw(*flags, main=cond.main, classifier=None):
        pictures, calls = Pictures(), {}
        for name in ("ddim_process", "reverse_process", "cfg_eps", "classifier_guided_eps"):
            calls[name] = []
            spied(monkeypatch, cond, name, lambda given, _, into=calls[name]: into.append(given))
        for script in (cond, figures):
            monkeypatch.setattr(script, "plotting", pictures)
            monkeypatch.setattr(script, "load_images", lambda *_: coded)
        monkeypatch.setattr(cond.quality, "load_judge", lambda *_, **__: (None, {}))
        if classifier:
            monkeypatch.setattr(cond, "train_classifier", lambda *_: classifier)
        main(["--sample", str(trained[0]), "--out", str(tmp_path / "drawn"), "--device", "cpu",
              *map(str, flags)])
        return pictures.drawn, calls, only_run(tmp_path / "drawn", "conditional")
    return draw


def runs_of(values):
    """Each value once where it is repeated in a row."""
    return [value for value, _ in groupby(values)]


# What the flags reach


def test_the_flags_of_ddim_reach_the_sampler(drawing, trained):
    """S, eta, spacing and clip_x0 everywhere; each figure its w and classes; the averaged network."""
    drawn, calls, folder = drawing("--S", 3, "--eta", 0.5, "--spacing", "quadratic", "--no-clip_x0",
                                   "--w", -1, 0, 3, "--w_samples", 0.5, "--classes", 3, 1, 4)
    assert calls["reverse_process"] == calls["classifier_guided_eps"] == []
    assert len(calls["ddim_process"]) == 1 + 3 + 1  # samples, grid, the film
    for given in calls["ddim_process"]:
        assert (given["S"], given["eta"], given["spacing"]) == (3, 0.5, "quadratic")
        assert given["clip_x0"] is False
        wanted = cond.make_schedule("linear", 20).alpha_bars
        assert torch.equal(given["schedule"].alpha_bars, wanted)
    asked = calls["cfg_eps"]
    assert runs_of([float(given["w"]) for given in asked]) == [0.5, -1, 0, 3, 0.5]
    for given in asked:
        assert given["y"].tolist() == [3, 1, 4] and not given["model"].training
        for name, value in trained[1].state_dict().items():
            assert torch.equal(given["model"].state_dict()[name], value)
    found = json.loads((folder / "metrics.json").read_text())
    assert found["sampling"]["n"] == 3 and found["sampling"]["network_calls"] == 3
    rows, _, names, columns = drawn["grid.png"]
    assert names == ["unconditional", "w = 0", "w = 3"] and columns == ["d", "b", "e"]
    assert all(len(row) == 3 for row in rows)
    noises = [given["xT"] for given in calls["ddim_process"]]
    assert all(torch.equal(xT, noises[1]) for xT in noises[2:4])  # each column one noise


@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_the_flags_of_the_ancestral_sampler_reach_it(variance, drawing):
    """S, a flag of DDIM alone, may be anything."""
    drawn, calls, folder = drawing("--sampler", "ancestral", "--variance", variance, "--n_samples", 4,
                                   "--no-clip_x0", "--S", 999)
    assert calls["ddim_process"] == [] and len(calls["reverse_process"]) == 1 + 1
    for given in calls["reverse_process"]:
        assert (given["variance"], given["clip_x0"]) == (variance, False)
    found = json.loads((folder / "metrics.json").read_text())
    assert found["sampling"]["network_calls"] == 20
    assert drawn["samples.png"][0][0][0] == "20 steps, w = 2" and "grid.png" not in drawn


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_the_flags_of_classifier_guidance_reach_it(sampler, drawing):
    """The scale is s = 1 + w, the classifier the one that was trained, the clamp before its push."""
    classifier = cond.NoisyClassifier(1, 10, 8, 4).eval().requires_grad_(False)
    drawn, calls, _ = drawing("--guidance", "classifier", "--sampler", sampler, "--variance", "beta",
                              "--w", -1, 0, 3, "--w_samples", 0.5, "--classes", 3, "--eta", 0.25,
                              classifier=classifier)
    used = calls["classifier_guided_eps"]
    assert all(given["classifier"] is classifier for given in used)
    alphas, scales = cond.make_schedule("linear", 20).alphas, []
    for given in used:  # of Alg. 1 with sigma^2 = beta: s sqrt(alpha)
        factor = 1 if sampler == "ddim" else alphas[given["t"][0]].sqrt()
        scales.append(round(float(given["s"].flatten()[0] / factor), 3))
        assert isinstance(given["model"], cond.ClippedModel)
    assert runs_of(scales) == [1.5, 0, 1, 4, 1.5]
    assert drawn["grid.png"][2] == ["unconditional", "s = 1", "s = 4"]
    process = calls["ddim_process" if sampler == "ddim" else "reverse_process"]
    assert len(process) == 1 + 3 + 1 and not any(given["clip_x0"] for given in process)
    if sampler == "ddim":
        assert all(given["eta"] == 0.25 and given["S"] == 5 for given in process)
    else:
        assert all(given["variance"] == "beta" for given in process)


def test_without_guidance_the_labels_alone_are_used(drawing):
    drawn, calls, _ = drawing("--guidance", "none", "--classes", 3, 3)
    assert calls["cfg_eps"] == calls["classifier_guided_eps"] == []
    assert len(calls["ddim_process"]) == 1 + 1 + 1
    assert drawn["grid.png"][2] == ["no guidance"]


def test_the_experiment_draws_every_class_from_the_same_noises(drawing):
    drawn, calls, _ = drawing("--w", 0, 3, "--w_samples", 0.5, main=figures.main)
    given = calls["ddim_process"]
    assert len(given) == 1 + 2 + 5  # neighbours, grid, same_noise
    labels = runs_of([tuple(each["y"].tolist()) for each in calls["cfg_eps"]])
    assert labels == [(*range(10), 0, 1), tuple(range(10))]
    assert runs_of([float(each["w"]) for each in calls["cfg_eps"]]) == [0.5, 0, 3, 0.5]
    assert drawn["grid.png"][2] == ["w = 0", "w = 3"]
    for each in given[3:]:  # each row one noise
        assert torch.equal(each["xT"], each["xT"][:1].expand_as(each["xT"]))
    assert not torch.equal(given[3]["xT"], given[4]["xT"])
    assert len(drawn["same_noise.png"][0]) == 5 and len(drawn["neighbours.png"][0]) == 12
    assert "classifier.png" not in drawn


# Mistakes


@pytest.mark.parametrize("argv, words", [
    (["--classes", "3", "10"], ["--classes 10", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"]),
    (["--classes", "-1"], ["--classes -1", "0, 1, 2"]),
    (["--classes", "cat"], ["--classes", "cat"]),
    (["--w", "much"], ["--w", "much"]),
    (["--w", "nan"], ["--w nan"]),
    (["--w", "0", "-2"], ["--w 0.0 -2.0", ">= -1"]),
    (["--w"], ["--w", "at least one"]),
    (["--w_samples", "inf"], ["--w_samples inf"]),
    (["--backbone", "mlp"], ["--backbone", "mlp", "unet", "dit"]),
    (["--guidance", "clip"], ["--guidance", "clip", "classifier_free", "none"]),
    (["--sampler", "euler"], ["--sampler", "euler", "ddim", "ancestral"]),
    (["--backbone", "dit", "--dit_kernel", "2"], ["--dit_kernel 2", "odd"]),
    (["--backbone", "dit", "--dit_patch", "5"], ["--image_size 28", "multiple of 5", "25, 30"]),
    (["--image_size", "30", "--backbone", "unet"], ["--image_size 30", "multiple of 4"]),
    (["--backbone", "dit", "--dit_heads", "5"], ["--dit_heads 5", "--dit_width 16"]),
    (["--backbone", "dit", "--dit_width", "18"], ["--dit_width 18", "multiple of 4"]),
    (["--p_uncond", "1.1"], ["--p_uncond 1.1", "[0, 1]"]),
    (["--p_uncond", "1"], ["--p_uncond 1", "below 1", "--guidance classifier_free"]),
    (["--p_uncond", "1", "--guidance", "none"], ["--p_uncond 1", "below 1", "--guidance none"]),
    (["--p_uncond", "0"], ["--p_uncond 0", "null class"]),
    (["--S", "21"], ["--S 21", "at most T, 20"]),
    (["--classifier_steps", "0"], ["--classifier_steps 0", ">= 1"]),
    (["--preset", "dit_xxl"], ["--preset", "dit_xxl", "dit_xl"]),
])
def test_a_mistake_is_one_line_and_status_2(argv, words, tmp_path, capsys):
    refused(cond.main, argv, words, tmp_path, capsys)


def refused(main, argv, words, tmp_path, capsys):
    preset = [] if "--preset" in argv or "--sample" in argv else ["--preset", "smoke"]
    with pytest.raises(SystemExit) as stop:
        main([*preset, "--device", "cpu", "--out", str(tmp_path / "o"), *argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    for word in words:
        assert word in lines[0]
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("argv, words", [
    (["--seconds", "0"], ["--seconds 0.0", "> 0"]),
    (["--dit_heads", "5"], ["--dit_heads 5", "--dit_width 16"]),  # before the U-Net is trained
    (["--backbone", "dit"], ["--backbone", "both"]),
    (["--steps", "7"], ["--steps", "--seconds"]),
    (["--w", "3"], ["--w", "--w_samples"]),
    (["--sample"], ["--sample", "trained anew"]),
])
def test_compare_refuses_what_it_would_not_use(argv, words, tmp_path, capsys):
    refused(compare.main, argv, words, tmp_path, capsys)


def test_the_sweep_wants_a_network_with_a_null_class(tmp_path, capsys):
    cfg, run, data = open_run(cond, tmp_path, "--p_uncond", 0, "--guidance", "none", "--steps", 1)
    cond.train(cfg, run, data)
    capsys.readouterr()
    refused(figures.main, ["--sample", str(run.folder), "--guidance", "none", "--evaluate", "10"],
            ["--evaluate 10", "null class"], tmp_path, capsys)


def test_data_without_labels_is_refused(tmp_path, capsys):
    from PIL import Image

    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 9, 9)).save(tmp_path / f"{i}.png")
    refused(cond.main, ["--dataset", f"folder:{tmp_path}"], ["no labels"], tmp_path, capsys)


# Runs


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The folder of one smoke run."""
    out = tmp_path_factory.mktemp("smoke")
    cond.main(["--preset", "smoke", "--device", "cpu", "--out", str(out)])
    return only_run(out, "conditional")


@pytest.mark.slow
def test_a_run_trains_and_writes_every_file(smoke, tmp_path, capsys):
    assert {file.name for file in smoke.iterdir()} == {
        "config.json", "log.csv", "metrics.json", "checkpoint.pt", "preview.png", "samples.png",
        "loss.png", "denoising.gif"}
    for name in ("preview", "samples", "loss"):
        open_picture(smoke / f"{name}.png")
    assert len(open_picture(smoke / "denoising.gif")) == 6  # at five t, and at 0
    found = json.loads((smoke / "metrics.json").read_text())
    assert found["sampling"]["n"] == 20 and found["sampling"]["seconds"] > 0
    assert 0 <= found["samples"]["accuracy"] <= 1
    assert found["samples"]["accuracy_of_held_out"] > 0.95
    assert found["samples"]["legible"] < 0.01  # six steps of training draw no digits
    state = torch.load(smoke / "checkpoint.pt", weights_only=True)
    assert state["step"] == 6 and state["loop"] == "model" and state["script"] == "conditional"
    assert state["ema"]["network.label.weight"].shape[0] == 11
    cond.main(["--sample", str(smoke), "--n_samples", "10", "--device", "cpu", "--out", str(tmp_path)])
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.endswith(f"more: python experiments/conditional.py --sample {smoke}") and "legible" in last
    assert not (only_run(tmp_path, "conditional") / "loss.png").exists()  # nothing was trained


@pytest.mark.slow
def test_sample_draws_exactly_the_classes_asked_for_above_real_ones(smoke, tmp_path, monkeypatch):
    tables, asked = {}, []
    spied(monkeypatch, cond, "guided_process", lambda given, _: asked.append(
        (given["y"].tolist(), float(given["w"]))))
    monkeypatch.setattr(cond.plotting, "table", lambda path, rows, title, *labels:
                        tables.update({path.name: (rows, *labels)}))
    cond.main(["--sample", str(smoke), "--out", str(tmp_path), "--classes", "3", "1", "4", "1", "5",
               "--w", "0", "1", "3", "8"])
    assert asked == [([3, 1, 4, 1, 5], w) for w in (2.0, 0.0, 1.0, 3.0, 8.0, 2.0)]
    (drawn, real), names, columns = tables["samples.png"]
    assert names == ["w = 2", "real"] and columns == ["3", "1", "4", "1", "5"] and len(drawn) == 5
    data = load_images("digits")
    for picture, label in zip(real, (3, 1, 4, 1, 5), strict=True):
        same = (data.train == picture).flatten(1).all(1)
        assert data.train_labels[same].tolist() == [label]


def by_row(pictures, n):
    return pictures.flatten(1).mean(1).view(-1, n)


@pytest.mark.slow
def test_samples_stand_by_class_beside_held_out_pictures_of_it(drawing, monkeypatch):
    """Each row of either grid is of one class."""
    grey = torch.arange(10.0).div(5).sub(0.9)
    monkeypatch.setattr(cond, "guided_process", lambda cfg, model, xT, schedule, y, *_: iter(
        [(0, grey[y].view(-1, 1, 1, 1).expand_as(xT))]))
    drawn, _, _ = drawing("--n_samples", 30)
    parts, _, n = drawn["samples.png"]
    assert n == 3
    for _, pictures in parts:
        assert_close(by_row(pictures, n), grey[:, None].expand(10, n))


def interrupts_in(name, monkeypatch):
    """Ctrl-C in the second step of a loop."""
    steps = common.run.Run.steps

    def interrupted(run, count, loop="model", *args, **kwargs):
        for step in steps(run, count, loop, *args, **kwargs):
            yield step
            if loop == name and step == 1:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(common.run.Run, "steps", interrupted)


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["model", "classifier"])
def test_after_ctrl_c_nothing_is_drawn_with_an_unfinished_classifier(loop, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    interrupts_in(loop, monkeypatch)
    cond.main(["--preset", "smoke", "--guidance", "classifier", "--device", "cpu", "--out", str(tmp_path),
               "--preview_every", "100"])
    folder = only_run(tmp_path, "conditional")
    assert {file.name for file in folder.iterdir()} == {"config.json", "log.csv", "metrics.json", "checkpoint.pt"}
    assert "no classifier to guide the samples; --resume goes on" in capsys.readouterr().out
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["step"] == (2 if loop == "model" else 6)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_the_dit_is_trained_and_drawn(tmp_path):
    cond.main(["--preset", "smoke", "--backbone", "dit", "--n_samples", "10", "--device", "cpu", "--out", str(tmp_path)])
    folder = only_run(tmp_path, "conditional")
    open_picture(folder / "samples.png")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert "network.blocks.1.condition.weight" in state["ema"]


# The sweep, and both networks


@pytest.fixture
def quick_scores(monkeypatch):
    """Scores without a judge; the samples and labels that were scored."""
    seen = []

    def scores(samples, data, labels=None):
        seen.append((samples, labels))
        return {"n": len(samples), "accuracy": 0.5, "accuracy_of_held_out": 0.9, "recall": 0.6,
                "frechet_distance": float(len(seen)), "frechet_distance_of_held_out": 1.0}

    monkeypatch.setattr(cond.quality, "scores", scores)
    return seen


def test_guidance_is_measured_at_every_weight(trained, coded, tmp_path, monkeypatch, quick_scores):
    """By both kinds, always from the same noises; w = -1 is the same network for both."""
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(figures, "load_images", lambda *_: coded)
    figures.main(["--sample", str(trained[0]), "--out", str(tmp_path), "--device", "cpu", "--evaluate", "12",
                  "--S", "2", "--w", "0", "3", "--classifier_steps", "25"])
    folder = only_run(tmp_path, "conditional")
    for name in ("grid", "same_noise", "neighbours", "guidance", "classifier"):
        open_picture(folder / f"{name}.png")
    found = json.loads((folder / "metrics.json").read_text())
    right = found["noisy_classifier_accuracy_by_t"]
    assert list(right) == [str(t) for t in range(1, 21)] and right["1"] > 0.3  # by chance: 0.1
    assert right["1"] > right["20"]
    assert {name: list(rows) for name, rows in found["guidance_sweep"].items()} == {
        "classifier-free": ["-1", "0", "2", "3"], "classifier: null class": ["-1", "0", "2", "3"]}
    assert len(quick_scores) == 8
    assert all(y.tolist() == [i % 10 for i in range(12)] for _, y in quick_scores)
    drawn = [x for x, _ in quick_scores]
    assert_close(drawn[0], drawn[4])
    for one, other in ((1, 2), (5, 6), (2, 6)):
        assert (drawn[one] - drawn[other]).abs().max() > 1e-4
    assert found["evaluation"] == found["guidance_sweep"]["classifier-free"]["2"]
    assert found["evaluation"]["network_calls"] == 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_an_unconditional_network_is_guided_by_the_classifier(coded, tmp_path, monkeypatch, quick_scores):
    """--p_uncond 1: every label dropped, samples by the classifier, its sweep alone in the table."""
    monkeypatch.setattr(common.data, "CACHE", tmp_path / "cache")
    dropped = []
    spied(monkeypatch, cond, "drop_labels", lambda _, out: dropped.append(out))
    for script in (cond, figures):
        monkeypatch.setattr(script, "load_images", lambda *_: coded)
    flags = ["--guidance", "classifier", "--device", "cpu", "--S", "2"]
    folder, _ = train_on(coded, tmp_path / "a", "--p_uncond", 1, *flags)
    assert torch.cat(dropped).eq(10).all()
    cond.main(["--sample", str(folder), *flags, "--out", str(tmp_path / "b")])
    open_picture(only_run(tmp_path / "b", "conditional") / "samples.png")
    figures.main(["--sample", str(folder), *flags, "--evaluate", "10", "--out", str(tmp_path / "c")])
    found = json.loads((only_run(tmp_path / "c", "conditional") / "metrics.json").read_text())
    (name, sweep), = found["guidance_sweep"].items()
    assert name == "classifier: unconditional" and list(sweep) == ["-1", "0", "2"]


def test_the_rows_of_the_sweep_are_the_lines_of_the_figure(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.plotting, "curves", lambda path, parts, title: drawn.append((parts, title)))
    row = {"n": 8, "accuracy": 0.5, "accuracy_of_held_out": 0.9, "recall": 0.6, "frechet_distance": 9.0,
           "frechet_distance_of_held_out": 1.0}
    figures.figure_guidance(tmp_path / "guidance.png", {"one": {"-1": row, "2": row | {"recall": 0.3}}})
    (accuracy, recall, distance), title = drawn[0]
    assert title == "8 samples per point"
    assert accuracy["lines"] == {"one": ([-1.0, 2.0], [0.5, 0.5], "o-")} and accuracy["levels"] == {"held out": 0.9}
    assert recall["lines"] == {"_one": ([-1.0, 2.0], [0.6, 0.3], "o-")} and recall["levels"] == {}
    assert distance["lines"] == {"_one": ([-1.0, 2.0], [9.0, 9.0], "o-")} and distance["levels"] == {"_held out": 1.0}


def test_guidance_is_drawn_of_both_evaluations(tmp_path, monkeypatch):
    drawn = []
    spied(monkeypatch, guidance, "figure_guidance", lambda given, _: drawn.append(given["scores"]))
    row = {"n": 8, "accuracy": 0.5, "accuracy_of_held_out": 0.9, "recall": 0.6, "frechet_distance": 9.0,
           "frechet_distance_of_held_out": 1.0}
    for file, name in (("evaluation", "one"), ("evaluation_unconditional", "other")):
        (tmp_path / f"{file}.json").write_text(json.dumps({"guidance_sweep": {name: {"-1": row, "2": row}}}))
    guidance.main(tmp_path)
    assert list(drawn[0]) == ["one", "other"]
    open_picture(tmp_path / "guidance.png")


@pytest.mark.slow
def test_compare_trains_both_networks_for_the_same_time_and_draws_as_asked(tmp_path, monkeypatch, quick_scores):
    """Every flag of the sampler reaches both, and both begin with the same noises."""
    asked, costs = [], iter([{"seconds": 0.05}, {"seconds": 0.04}])
    monkeypatch.setattr(compare, "training_cost", lambda *_, **__: next(costs))
    spied(monkeypatch, cond, "guided_process", lambda given, _: asked.append(given))
    compare.main(["--preset", "smoke", "--seconds", "0.5", "--preview_every", "1000", "--device", "cpu",
                  "--out", str(tmp_path), "--sampler", "ancestral", "--variance", "beta", "--guidance",
                  "none", "--no-clip_x0", "--classes", "3", "7", "--w_samples", "3"])
    folder = only_run(tmp_path, "conditional")
    open_picture(folder / "compare.png")
    found = json.loads((folder / "metrics.json").read_text())["compare"]
    assert [found[name]["steps"] for name in ("unet", "dit")] == [10, 12]
    assert [given["cfg"].backbone for given in asked] == ["unet", "dit"]
    for given in asked:
        cfg = given["cfg"]
        assert (cfg.sampler, cfg.variance, cfg.guidance, cfg.clip_x0) == ("ancestral", "beta", "none", False)
        assert given["w"] == 3.0 and given["y"].tolist() == [3, 7]
    assert torch.equal(asked[0]["xT"], asked[1]["xT"])
    assert [len(x) for x, _ in quick_scores] == [2, 2] and quick_scores[0][1].tolist() == [3, 7]
    for name in ("unet", "dit"):  # runs of the page, from which it draws
        state = torch.load(folder / name / "checkpoint.pt", weights_only=True)
        assert "seconds" not in state["config"] and state["config"]["backbone"] == name
