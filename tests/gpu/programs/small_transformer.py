"""A small language model, trained in the precision that is asked for, on the device that is asked for.

With ``--reads`` it prints, for every optimizer step, how often the code around its own asked a tensor for its
value, and how often torch warned of an operation that waits for the GPU.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

VOCABULARY, LENGTH, WIDTH = 64, 16, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(self.before_attention(x)).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.before_mlp(x))


class Transformer(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.positions(places))))


class Reads:
    """Counts, between two steps, values asked for by files of the recorder, and warnings of synchronisation."""

    def __init__(self, device: torch.device) -> None:
        self.counts: Counter[str] = Counter()
        for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
            setattr(torch.Tensor, name, self._counting(name, getattr(torch.Tensor, name)))
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
            warnings.simplefilter("always")
            warnings.showwarning = self._warned

    def _counting(self, name: str, original: Callable[..., object]) -> Callable[..., object]:
        def counting(tensor: torch.Tensor, *args: object, **kwargs: object) -> object:
            if "/trainlint/recorder/" in sys._getframe(1).f_code.co_filename:
                self.counts["reads"] += 1
            return original(tensor, *args, **kwargs)

        return counting

    def _warned(self, message: object, *args: object, **kwargs: object) -> None:
        self.counts["waits"] += "synchronizing" in str(message)

    def stepped(self) -> None:
        print("reads and waits:", self.counts["reads"], self.counts["waits"], flush=True)
        self.counts.clear()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16-autocast", "bf16", "fp16-scaled"), default="fp32")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--compile", default="", help="a backend of torch.compile")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--reads", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device(args.device)
    model = Transformer(args.layers).to(device, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    decayed = [p for p in model.blocks.parameters() if p.ndim == 2] + [model.head.weight]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, fused=args.fused or None)
    forward = torch.compile(model, backend=args.compile) if args.compile else model
    scaled = args.precision == "fp16-scaled"
    scaler = torch.amp.GradScaler(device.type, enabled=scaled, init_scale=2.0**10)
    autocast = {"bf16-autocast": torch.bfloat16, "fp16-scaled": torch.float16}.get(args.precision)

    # Each token follows from the one before: something to learn.
    first = torch.randint(VOCABULARY, (512, 1))
    tokens = (first * 5 + 3 * torch.arange(LENGTH + 1)) % VOCABULARY
    loader = DataLoader(TensorDataset(tokens), batch_size=16, shuffle=True)
    reads = Reads(device) if args.reads else None
    for _ in range(4):
        for (batch,) in loader:
            batch = batch.to(device, non_blocking=True)
            with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
                logits = forward(batch[:, :-1])
                loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
            if reads is not None:
                reads.stepped()


if __name__ == "__main__":
    main()
