"""What the tests share: exact answers to stand in for the network, and ways to run a script."""

import contextlib
import importlib.util
import inspect
import io
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import plotting
from common import run as runs
from common.data import load_data

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "experiments"))  # as for a script that is started there
torch.set_num_threads(1)  # the tensors here are small, and two test runs may share a machine
plotting.STYLE |= {"figure.dpi": 40, "savefig.bbox": None}  # small figures are drawn faster


class ExactEps:
    """The best possible noise prediction E[eps | x_t] where x_0 is a mixture of Gaussians.

    weights: K numbers; means: (K, D); covs: (K, D, D); alpha_bars: (T+1,). It is called like the
    network: x (B, C, H, W) with C*H*W = D, t int64 of shape (B,) -> like x. With y, int64 of shape
    (B,), the data of sample b is component y[b] alone; y = K is the null class, the whole mixture.
    eps* = -sqrt(1 - alpha_bar) * grad log p_t(x_t), p_t the mixture of
    N(sqrt(alpha_bar) mean_k, alpha_bar cov_k + (1 - alpha_bar) I).
    """

    def __init__(self, alpha_bars, weights, means, covs):
        self.alpha_bars = alpha_bars.double()
        self.weights = torch.as_tensor(weights, dtype=torch.float64)
        self.weights = self.weights / self.weights.sum()
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.covs = torch.as_tensor(covs, dtype=torch.float64)

    def __call__(self, x, t, y=None):
        assert t.shape == (len(x),) and t.dtype == torch.int64
        out = torch.empty_like(x)
        for value in t.unique().tolist():  # samplers call with one t, losses with several
            rows = t == value
            out[rows] = self._at(x[rows], value, None if y is None else y[rows])
        return out

    def _at(self, x, t, y):
        alpha_bar, flat = self.alpha_bars[t], x.flatten(1).double()
        if alpha_bar == 1:
            return torch.zeros_like(x)
        eye = torch.eye(flat.shape[1], dtype=torch.float64)
        cov = alpha_bar * self.covs + (1 - alpha_bar) * eye  # (K, D, D)
        gap = flat[:, None] - alpha_bar.sqrt() * self.means  # (B, K, D)
        solved = torch.linalg.solve(cov, gap[..., None])[..., 0]
        log_p = self.weights.log() - 0.5 * ((gap * solved).sum(-1) + torch.logdet(cov))
        share = log_p.softmax(1)  # p(component | x_t), (B, K)
        if y is not None:
            one = torch.nn.functional.one_hot(y, len(self.weights) + 1)[:, :-1].double()
            share = torch.where((y < len(self.weights))[:, None], one, share)
        return ((1 - alpha_bar).sqrt() * (share[..., None] * solved).sum(1)).view_as(x).to(x.dtype)

    def moments(self):
        """Mean (D,) and covariance (D, D) of x_0."""
        mean = self.weights @ self.means
        gap = self.means - mean
        outer = gap[:, :, None] * gap[:, None, :]
        return mean, (self.weights[:, None, None] * (self.covs + outer)).sum(0)

    def draw(self, n, generator=None):
        """n samples of x_0 as (n, D, 1, 1) float32, and their components (n,)."""
        y = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], 1, dtype=torch.float64, generator=generator)
        x = self.means[y] + (torch.linalg.cholesky(self.covs)[y] @ z)[..., 0]
        return x.float()[:, :, None, None], y

    def nearest(self, x):
        """Share of x (B, D, 1, 1) closest to each mean: the weights of well-separated modes."""
        which = torch.cdist(x.flatten(1).double(), self.means).argmin(1)
        return torch.bincount(which, minlength=len(self.means)).double() / len(x)


def gaussian_eps(alpha_bars, mean=(0.6, -0.3), cov=((0.50, 0.20), (0.20, 0.25))):
    """ExactEps of one Gaussian: 2-D and correlated unless said otherwise."""
    return ExactEps(alpha_bars, [1.0], [mean], [cov])


def mixture_eps(alpha_bars):
    """ExactEps of three well-separated 2-D modes of unequal weight, width and orientation."""
    return ExactEps(alpha_bars, [0.5, 0.3, 0.2], [[-1.2, 0.0], [1.0, 0.9], [0.9, -1.1]],
                    [[[0.02, 0.0], [0.0, 0.06]], [[0.04, 0.02], [0.02, 0.04]],
                     [[0.05, 0.0], [0.0, 0.02]]])


def mean_and_cov(x):
    """Sample mean (D,) and covariance (D, D) of x (B, D, 1, 1), float64."""
    flat = x.flatten(1).double()
    return flat.mean(0), torch.cov(flat.T)


def script_name(module):
    """The name of a script's run folders: that of its file without the words all of them share."""
    return module.__name__.removesuffix("_example").removesuffix("_diffusion")


def open_run(module, out, *argv):
    """(cfg, run, data) of a script's smoke preset with a few more arguments, as its main makes them."""
    argv = ["--preset", "smoke", "--device", "cpu", "--out", str(out), *map(str, argv)]
    cfg, run = runs.open_run(script_name(module), module.Config, module.PRESETS, module.SAMPLING, argv)
    return cfg, run, run.load(load_data, cfg.dataset, cfg.image_size)


DRAW = {name: draw for name, draw in vars(plotting).items() if hasattr(draw, "__wrapped__")}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished(page, *argv) -> (run folder, printed text) of main's smoke run, made once a session.

    The folder is shared: --sample it, and leave it as it is.
    """
    made = {}

    def run(page, *argv):
        key = page, argv
        if key not in made:
            out, said = tmp_path_factory.mktemp(script_name(page)), io.StringIO()
            flags = ["--preset", "smoke", "--device", "cpu", "--out", out, *argv]
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), \
                    pytest.MonkeyPatch.context() as patch:
                for name, draw in DRAW.items():  # where the first test to ask draws nothing
                    patch.setattr(plotting, name, draw)
                page.main([str(flag) for flag in flags])
            made[key] = only_run(out, script_name(page)), said.getvalue()
        return made[key]

    return run


@pytest.fixture
def drawings(monkeypatch):
    """{file name: what the drawing function was handed, by the names of its arguments}.

    Nothing is drawn, which is most of the time of a figure: test what was handed over.
    """
    handed = {}

    def recorder(draw):
        def record(*args, **kwargs):
            given = inspect.signature(draw).bind(*args, **kwargs)
            given.apply_defaults()
            handed[Path(given.arguments["path"]).name] = dict(given.arguments)
        return record

    for name, draw in list(vars(plotting).items()):
        if hasattr(draw, "__wrapped__") and "path" in inspect.signature(draw).parameters:
            monkeypatch.setattr(plotting, name, recorder(draw))
    return handed


def experiment(name):
    """A script of experiments/ as a module: experiment("ddpm")."""
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", ROOT / f"experiments/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def awake(network):
    """The network with no weight left at the zero that it starts from."""
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.normal_(std=0.3)
    return network.eval()


# Of a script's process: one thread, nothing of an outer torchrun
ENVIRONMENT = {name: value for name, value in os.environ.items()
               if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
               } | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}


def beside(begin):
    """Decorator of a test: begin(folder) is called beside the other tests, and its result is the fixture `done`."""
    def decorate(test):
        test.begin = begin
        return test

    return decorate


@pytest.fixture(scope="session", autouse=True)
def _beside(request, tmp_path_factory):
    """The processes of the selected tests: a second core runs them one after the other, from the start."""
    with ThreadPoolExecutor(1) as pool:
        yield {item.name: pool.submit(item.function.begin, tmp_path_factory.mktemp(item.function.begin.__name__))
               for item in request.session.items if hasattr(getattr(item, "function", None), "begin")}
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def done(request, _beside):
    """What begin of @beside(begin) has returned."""
    return _beside[request.node.name].result()


def only_run(out, script):
    """The one run folder of a script under out."""
    folders = sorted((Path(out) / script).iterdir())
    assert len(folders) == 1, folders
    return folders[0]


def open_picture(path):
    """The decoded frames of a picture file as uint8 arrays; a picture of one colour fails."""
    from PIL import Image, ImageSequence

    with Image.open(path) as picture:
        frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(picture)]
    assert min(frames[0].shape[:2]) > 20 and all(f.std() > 1 for f in frames), path
    return frames


def assert_same_tree(a, b, where="checkpoint"):
    """Two nested structures of dicts, lists, tensors and plain values are equal to the last bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same_tree(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tree(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda m: f"{where}: {m}")
    else:
        assert a == b, where


def spied(monkeypatch, owner, name, look):
    """Replace owner.name by itself with a witness: look(arguments by name, result)."""
    true = getattr(owner, name)

    def watched(*args, **kwargs):
        bound = inspect.signature(true).bind(*args, **kwargs)
        bound.apply_defaults()
        out = true(*args, **kwargs)
        look(bound.arguments, out)
        return out

    monkeypatch.setattr(owner, name, watched)


@pytest.fixture(autouse=True)
def _figures_are_drawn(request):
    """A run goes on where a figure cannot be drawn; here it fails the test."""
    plotting.not_drawn.clear()
    yield
    if "may_not_draw" not in request.keywords:
        assert not plotting.not_drawn


@pytest.fixture(autouse=True)
def _quiet_state():
    """Each test draws from the same seed, and a Ctrl-C handler left by a run is taken away."""
    torch.manual_seed(0)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def _one_step_flow(tmp_path_factory):
    """The checkpoint of one step of training of a flow with labels."""
    import flow_matching_example as flow

    cfg, run, data = open_run(flow, tmp_path_factory.mktemp("flow"), "--p_uncond", 0.5, "--steps", 1)
    flow.train(cfg, run, data)
    return torch.load(run.path("checkpoint.pt"), weights_only=True)


@pytest.fixture
def copied(_one_step_flow, tmp_path):
    """copied(i, coupling="ot"): a copy of it with weights of its own and other values in its Config."""
    def copy(i, **values):
        state, file = _one_step_flow, tmp_path / f"{i}.pt"
        ema = {name: weight + (i + 1) * 0.05 * torch.randn_like(weight) for name, weight in state["ema"].items()}
        torch.save(state | {"ema": ema, "config": state["config"] | values}, file)
        return file, ema
    return copy
