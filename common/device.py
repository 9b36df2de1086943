"""Where a run happens: CPU, CUDA or Apple MPS; one process or several under torchrun; seeds;
precision.
"""

import contextlib
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from .cli import fail


@dataclass
class Launch:
    """One process of a run. rank 0 writes; world is the number of processes."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def main(self):
        return self.rank == 0

    def shard(self, batch):
        """This rank's slice of a batch that every rank drew alike. batch: (B, ...) -> (B / world,
        ...).
        """
        share = len(batch) // self.world
        return batch[self.rank * share : (self.rank + 1) * share]

    def average(self, tensors):
        """Average tensors over all processes, in place, in one message."""
        if self.world == 1:
            return
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        flat /= self.world
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))


def launch(name="auto"):
    """Choose the device and, under torchrun, join the group (NCCL on CUDA, gloo elsewhere)."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = pick_device(name)
    if device.type == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Launch(device, rank, world)


def pick_device(name="auto"):
    """torch.device for auto (CUDA, else MPS, else CPU), cpu, cuda or mps; one that is absent is an
    error.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(),
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


def autocast(device, amp):
    """Mixed precision for the forward pass; amp: off, bf16 or fp16."""
    if amp == "off":
        return contextlib.nullcontext()
    if amp == "fp16" and device.type != "cuda":
        fail(f"--amp fp16: needs CUDA for its loss scaling, the device is {device.type}")
    return torch.autocast(device.type, torch.bfloat16 if amp == "bf16" else torch.float16)


def peak_memory_mb(device):
    """Peak memory of this process so far, in MB (10^6 bytes): allocated on CUDA, resident
    elsewhere.
    """
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

    def __exit__(self, *_):
        synchronize(self.device)
        self.seconds += time.perf_counter() - self.start
