"""Prefix attention, forward and backward, 128 queries at a time and all at once: what model/prefix_attention.py asks.

python benchmarks/prefix_attention.py [--tokens 256 512 1024 2048] [--dtype float32] [--heads 16 8 128]
"""

from __future__ import annotations

import argparse

import mlx.core as mx

from mlx_dmpo.model.device import device_name
from mlx_dmpo.model.prefix_attention import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--heads", type=int, nargs=3, default=[16, 8, 128], metavar="N", help="heads, key heads, size")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(f"{device_name()}, {args.dtype}, {args.heads}: chunks, whole")
    for tokens in args.tokens:
        heads, kv_heads, size = args.heads
        found = measure(heads, kv_heads, size, getattr(mx, args.dtype), tokens, args.repeats)
        seconds, peaks = found["seconds"], found["bytes"]
        print(
            f"{tokens:>6} tokens  {1e3 * seconds['chunks']:.1f} ms, {1e3 * seconds['whole']:.1f} ms  "
            f"{peaks['chunks'] / 1e6:.0f} MB, {peaks['whole'] / 1e6:.0f} MB  -> "
            f"{'whole' if found['whole'] else 'chunks'}",
            flush=True,
        )


if __name__ == "__main__":
    main()
