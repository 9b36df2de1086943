"""Where a run happens: CPU, CUDA or MPS; one process or several; seeds and costs."""

import atexit
import contextlib
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from .cli import Mistake


@dataclass
class Launch:
    """One process of a run. Rank 0 writes; world is the number of processes."""

    device: torch.device
    rank: int = 0
    world: int = 1

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
        """Give every process the weights and buffers of the first one."""
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
    (rank, world, local), device = torchrun(), pick_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # a group that outlives Python may abort the process
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return Launch(device, rank, world)


def torchrun():
    """(rank, number of processes, rank on this machine), as torchrun sets them."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    found = {name: os.environ[name] for name in names if name in os.environ}
    if not found:
        return 0, 1, 0
    texts = [found.get(name, "") for name in names]
    if all(text.isdecimal() for text in texts):
        rank, world, local = map(int, texts)
        if rank < world:
            return rank, world, local
    given = " ".join(f"{name}={text}" for name, text in found.items())
    raise Mistake(f"{given}: {', '.join(names)} must be whole numbers, RANK below "
                  "WORLD_SIZE, as torchrun sets them; or unset all three")


@contextlib.contextmanager
def first_process_first():
    """The first process runs the block, then the others do, and find its files."""
    several = dist.is_initialized()
    if several and dist.get_rank() > 0:
        dist.barrier()
    yield
    if several and dist.get_rank() == 0:
        dist.barrier()


def pick_device(name="auto"):
    """torch.device for auto (CUDA, else Apple's MPS, else CPU), cpu, cuda or mps."""
    available = {"cuda": torch.cuda.is_available(),
                 "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available.get(name):
        here = ", ".join(kind for kind in available if available[kind])
        raise Mistake(f"--device {name}: must be one of auto, {here} on this machine")
    return torch.device(name)


def seed_everything(seed):
    """Seed torch (every device), numpy and random; a resume restores torch's alone."""
    random.seed(seed)
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
    """Restore what random_state returned; a device that is absent here is left out."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


@contextlib.contextmanager
def seeded(seed, device):
    """Inside the block draws come from this seed; outside the state is as before."""
    state = random_state(device)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        set_random_state(state, device)


def synchronize(device):
    """Wait for the device, so that a clock read next is right."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if device.type == "mps":
        torch.mps.synchronize()


@contextlib.contextmanager
def counted(network):
    """A list that grows by one entry with each call of the network in the block."""
    calls = []
    hook = network.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        hook.remove()
