"""Where a run happens: CPU, CUDA or MPS; one process or several; seeds; precision."""

import atexit
import contextlib
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from .cli import fail


@dataclass
class Launch:
    """One process of a run: rank 0 writes, world is the number of processes."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self):
        return self.rank == 0

    def average(self, tensors):
        """Average tensors over all processes, in place, in one message."""
        if self.world == 1:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, mean in zip(tensors, flat.split(sizes), strict=True):
            tensor.copy_(mean.view_as(tensor))

    def broadcast(self, module):
        """Give every process the weights and buffers that the main one has."""
        if self.world > 1:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)

    def gather(self, value):
        """The value of every process, in the order of their ranks."""
        values = [value]
        if self.world > 1:
            values = [None] * self.world
            dist.all_gather_object(values, value)
        return values


def launch(name="auto"):
    """Choose the device; under torchrun, join the group (NCCL on CUDA, else gloo)."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    rank, world, local = (_whole_number(*item) for item in names.items())
    device = pick_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)
    return Launch(device, rank, world)


def _leave():
    """Leave the group while Python still runs: a group that outlives it may abort."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _whole_number(variable, default):
    value = os.environ.get(variable, str(default))
    if not value.isdecimal():
        fail(f"{variable}={value}: must be a whole number, as torchrun sets it")
    return int(value)


def pick_device(name="auto"):
    """torch.device for auto (CUDA, else Apple's MPS, else CPU), cpu, cuda or mps.

    A device that is absent ends the program with one line.
    """
    available = {"cpu": True,
                 "cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if available[kind])
    if name not in available:
        fail(f"--device {name}: must be one of auto, cpu, cuda, mps")
    if not available[name]:
        here = ", ".join(kind for kind, there in available.items() if there)
        fail(f"--device {name}: not available on this machine (available: {here})")
    return torch.device(name)


def seed_everything(seed):
    """Seed torch (every device) and numpy."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def random_state(device):
    """The state of torch's generators as tensors, for a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state, device):
    """Undo random_state; the state of a device that is absent here is left out."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextlib.contextmanager
def seeded(seed, device):
    """Draws of their own inside the block; outside it the random state is as before."""
    state = random_state(device)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(state, device)


def autocast(device, amp):
    """Mixed precision for the forward pass; amp: off, bf16 or fp16."""
    if amp == "off":
        return contextlib.nullcontext()
    if amp == "fp16" and device.type != "cuda":
        fail("--amp fp16: needs CUDA for its loss scaling, "
             f"the device is {device.type}")
    dtype = torch.bfloat16 if amp == "bf16" else torch.float16
    return torch.autocast(device.type, dtype)


def peak_memory_mb(device):
    """Peak memory so far in MB (10^6 bytes): allocated on CUDA, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    try:
        import resource  # absent on Windows
    except ImportError:
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def synchronize(device):
    """Wait for the device, so that a wall clock read next is honest."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Adds up the wall time spent inside `with watch:` blocks, in seconds."""

    def __init__(self, device):
        self.device, self.seconds = device, 0.0

    def __enter__(self):
        self.start = time.perf_counter()
        return self

    def __exit__(self, *_):
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.start


class Meter:
    """Inside `with Meter(network, device) as meter:` counts the calls of the network.

    calls: their number; inside: the seconds in them; seconds: all that the block took.
    """

    def __init__(self, network, device):
        self.network, self.calls, self.seconds = network, 0, 0.0
        self.all, self.one = Stopwatch(device), Stopwatch(device)

    @property
    def inside(self):
        return self.one.seconds

    def __enter__(self):
        def before(*_):
            self.calls += 1
            self.one.__enter__()

        def after(*_):
            self.one.__exit__()

        self.hooks = [self.network.register_forward_pre_hook(before),
                      self.network.register_forward_hook(after)]
        self.all.__enter__()
        return self

    def __exit__(self, *_):
        self.all.__exit__()
        self.seconds = self.all.seconds
        for hook in self.hooks:
            hook.remove()


@torch.enable_grad()  # a figure is drawn without gradients
def training_cost(model, loss, *args, repeats=3):
    """What a training step costs, loss(model, *args) being a scalar.

    Returns the median of its "seconds", its 10^9 floating-point operations, "gflop",
    and the memory that is kept for the backward pass, "activations_mb".
    """
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    device, kept = next(model.parameters()).device, {}

    def step():
        optimizer.zero_grad()
        loss(model, *args).backward()
        optimizer.step()

    def remember(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        value = loss(model, *args)
    memory = sum(size for pointer, size in kept.items() if pointer not in weights)
    del value
    with FlopCounterMode(display=False) as counter:
        step()
    seconds = []
    for _ in range(repeats):
        with Stopwatch(device) as watch:
            step()
        seconds.append(watch.seconds)
    return {"seconds": sorted(seconds)[repeats // 2],
            "gflop": counter.get_total_flops() / 1e9, "activations_mb": memory / 1e6}
