"""The VQ-VAE's training step and a layer of window attention in plain PyTorch: what JAX is measured against.

    pip install torch
    python experiments/peer_torch.py --out=PEER.json [--cases=a,c,window_attention]
    python experiments/benchmark.py --cases=a,c,window_attention --compare=PEER.json

Its cases have the names, sizes and arithmetic of `pieces.py`, and its report the form of `benchmark.py`'s, so that
--compare prints the ratio JAX / PyTorch. Run one after the other on a quiet machine. glibc is told to keep freed
memory and, as in `benchmark.py`, to take huge pages, without which PyTorch on a CPU spends up to half of its time
getting memory back. Needs no JAX.
"""

import argparse
import ctypes
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

LEAST_RUNS, LEAST_SECONDS = 5, 1.0
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
DEPTH = {"hidden": 16, "stages": 5, "num_codes": 128, "code_dim": 512}
MASKS = {"hidden": 16, "stages": 4, "num_codes": 128, "code_dim": 512}
MASK_PATCH, MASK_RATIO = 16, 0.5


class ResidualBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.last = nn.Conv2d(width, width, 1)

    def forward(self, x_BCHW):
        return x_BCHW + self.last(functional.relu(self.second(functional.relu(self.first(x_BCHW)))))


class VQVAE(nn.Module):
    """Strided convolutions, two residual blocks, the nearest of an EMA codebook, and back."""

    def __init__(self, hidden: int, stages: int, num_codes: int, code_dim: int):
        super().__init__()
        widths = [1] + [hidden * 2**i for i in range(stages)]
        down = [nn.Conv2d(*pair, 4, 2, 1) for pair in itertools.pairwise(widths)]
        ups = [widths[-1], *reversed(widths[1:])]
        up = [nn.ConvTranspose2d(*pair, 4, 2, 1) for pair in itertools.pairwise(ups)]
        blocks = [[ResidualBlock(widths[-1]) for _ in range(2)] for _ in range(2)]
        self.encoder = nn.Sequential(*_with_relu(down), *blocks[0], nn.Conv2d(widths[-1], code_dim, 1))
        first = nn.Conv2d(code_dim, widths[-1], 1)
        self.decoder = nn.Sequential(*_with_relu([first]), *blocks[1], *_with_relu(up), nn.Conv2d(hidden, 1, 1))
        self.register_buffer("codebook_KD", torch.randn(num_codes, code_dim))
        self.register_buffer("sums_KD", torch.randn(num_codes, code_dim))
        self.register_buffer("counts_K", torch.zeros(num_codes))

    def forward(self, x_BCHW):
        """(reconstruction, commitment loss); moves the codebook."""
        z_BDhw = self.encoder(x_BCHW)
        z_BhwD = z_BDhw.permute(0, 2, 3, 1)
        rows_ND = z_BhwD.reshape(-1, z_BhwD.shape[-1])
        table_KD = self.codebook_KD
        distance_NK = (rows_ND**2).sum(1, keepdim=True) - 2 * rows_ND @ table_KD.T + (table_KD**2).sum(1)
        codes_N = distance_NK.argmin(1)
        quantized = table_KD[codes_N].reshape(z_BhwD.shape)
        commitment = 0.25 * functional.mse_loss(z_BhwD, quantized)
        self._move(rows_ND.detach(), functional.one_hot(codes_N, len(table_KD)).float())
        straight_BDhw = (z_BhwD + (quantized - z_BhwD).detach()).permute(0, 3, 1, 2)
        return self.decoder(straight_BDhw), commitment

    @torch.no_grad()
    def _move(self, rows_ND, one_hot_NK, decay: float = 0.99, epsilon: float = 1e-5):
        self.counts_K.mul_(decay).add_(one_hot_NK.sum(0), alpha=1 - decay)
        total, codes = self.counts_K.sum(), len(self.counts_K)
        self.counts_K = (self.counts_K + epsilon) / (total + codes * epsilon) * total
        self.sums_KD.mul_(decay).add_(one_hot_NK.T @ rows_ND, alpha=1 - decay)
        self.codebook_KD = self.sums_KD / self.counts_K[:, None]


def _with_relu(layers: list[nn.Module]) -> list[nn.Module]:
    return [module for layer in layers for module in (layer, nn.ReLU())]


class WindowAttention(nn.Module):
    """Cosine attention inside windows with a position bias from log-spaced offsets."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.bias_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, heads, bias=False))
        offsets = torch.arange(-(window - 1), window, dtype=torch.float32)
        table = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1).reshape(-1, 2) / (window - 1) * 8
        self.register_buffer("table", table.sign() * torch.log2(1 + table.abs()) / 3)
        y, x = torch.arange(window**2) // window, torch.arange(window**2) % window
        rows, columns = (v[:, None] - v[None] + window - 1 for v in (y, x))
        self.register_buffer("index", rows * (2 * window - 1) + columns)

    def forward(self, x_NTC):
        n, t, c = x_NTC.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = functional.linear(x_NTC, self.qkv.weight, bias).reshape(n, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp()
        logits = (functional.normalize(q, dim=-1) * scale) @ functional.normalize(k, dim=-1).transpose(-2, -1)
        position = 16 * torch.sigmoid(self.bias_mlp(self.table)[self.index]).permute(2, 0, 1)
        out = (logits + position).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(n, t, c))


def training_step(fields: dict[str, int], maps_BCHW: torch.Tensor, masked: bool) -> Callable[[], torch.Tensor]:
    """One step of Adam; `masked`: half of the patches hidden, and pixels without depth left out of the loss."""
    model = VQVAE(**fields)
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)

    def step():
        given = _hide(maps_BCHW) if masked else 2 * (maps_BCHW - 0.5)
        target = maps_BCHW if masked else given
        output, commitment = model(given)
        error = (output - target) ** 2
        loss = (error[target > 0].mean() if masked else error.mean()) + commitment
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    return step


def _hide(maps_BCHW: torch.Tensor) -> torch.Tensor:
    b, _, h, w = maps_BCHW.shape
    rows, columns = h // MASK_PATCH, w // MASK_PATCH
    order = torch.rand(b, rows * columns).argsort(1)
    keep = (order >= math.ceil(MASK_RATIO * rows * columns)).float().reshape(b, 1, rows, columns)
    return maps_BCHW * keep.repeat_interleave(MASK_PATCH, 2).repeat_interleave(MASK_PATCH, 3)


def attention_runs() -> dict[str, Callable[[], torch.Tensor]]:
    layer, x_NTC = WindowAttention(512, 16, 30), torch.randn(4, 900, 512, requires_grad=True)

    def gradient():
        return torch.autograd.grad(layer(x_NTC).sum(), [x_NTC, *layer.parameters()])

    return {"forward": torch.no_grad()(lambda: layer(x_NTC)), "gradient": gradient}


CASES = {
    "a": lambda: {"step": training_step(DEPTH, 10 * torch.rand(8, 1, 480, 480), masked=True)},
    "c": lambda: {f"batch_{n}": training_step(MASKS, torch.rand(n, 1, 64, 64), masked=False) for n in (128, 512)},
    "window_attention": attention_runs,
}


def measure(case: str) -> dict[str, dict]:
    """Median seconds of every program of a case after one run, and the peak memory of this process then."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
    torch.manual_seed(0)
    torch.set_num_threads(_cores())
    numbers = {}
    for name, run in CASES[case]().items():
        run()
        spent: list[float] = []
        while len(spent) < LEAST_RUNS or sum(spent) < LEAST_SECONDS:
            started = time.perf_counter()
            run()
            spent.append(time.perf_counter() - started)
        numbers[name] = {"latency_s": statistics.median(spent), "runs": len(spent)}
        status = Path("/proc/self/status")
        if status.exists():
            peak = 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
            numbers[name]["peak_memory"] = {"process_bytes": peak}
    return numbers


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def main() -> int:
    parser = argparse.ArgumentParser(description="Cases of benchmark.py in plain PyTorch, on the CPU.")
    parser.add_argument("--cases", default=",".join(CASES), help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--out", default="", help="file for the report, for benchmark.py --compare")
    options = parser.parse_args()
    names = options.cases.split(",")
    if unknown := [name for name in names if name not in CASES]:
        print(f"error: --cases: {', '.join(unknown)} unknown; valid are {', '.join(CASES)}", file=sys.stderr)
        return 1
    os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # read when the process of a case starts
    report = {"environment": {"torch": torch.__version__, "cores": _cores()}, "cases": {}}
    for name in names:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            report["cases"][name] = pool.apply(measure, (name,))
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        Path(options.out).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
