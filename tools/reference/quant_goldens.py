#!/usr/bin/env python3
"""Writes the goldens of `src/quant`: blocks decoded and weights encoded by the Python package `gguf`.

    pip install gguf && python tools/reference/quant_goldens.py tests/data/quant

NAME.dequant: blocks, then their weights as little-endian f32. NAME.quant: weights, then their blocks.
How many follows from the size of the file. The seed is fixed: a second run writes the same bytes.
"""
import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

# f16 fields of a block, by byte offset. Random bytes there would mostly be huge or NaN.
SCALES = {
    "F32": (), "F16": (), "BF16": (), "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}
ENCODED = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
PLAIN = ("F32", "F16", "BF16")


def with_scale(block, offsets, value):
    for at in offsets:
        block[at:at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)
    return block


def blocks_of(name, rng):
    """Random blocks, and the ones at the edge: all bits clear or set, -128, zero and subnormal scales."""
    size = GGML_QUANT_SIZES[T[name]][1]
    random = lambda: rng.integers(0, 256, size, np.uint8)
    scale = lambda value, block: with_scale(block, SCALES[name], value)
    fill = lambda byte: np.full(size, byte, np.uint8)
    n = 32 if name in PLAIN else 1
    blocks = [fill(0), fill(255), scale(0.03, fill(0x80)), scale(2.0**-24, fill(255)), scale(0.0, random()),
              scale(-0.7, random())] + [scale(rng.normal(), random()) for _ in range(n)]
    return np.concatenate(blocks)


def weights_for(name, rng):
    x = rng.normal(size=(6, 32)).astype(np.float32)
    x[0] = 0
    x[1] = np.where(np.arange(32) % 2 == 0, 0.5, -0.5)  # equal magnitudes: the first one decides the sign
    x[2] = np.arange(32) - 16  # many values half way between two codes
    x[3] *= np.float32(1e-7)  # a subnormal scale
    x[4, ::3] = -0.0
    if name in PLAIN:
        x[5, :8] = [np.inf, -np.inf, 65504, 65520, 1e-8, -1e-8, 3.3e38, 1.00390625]
    return x.reshape(-1)


def main(folder):
    np.seterr(all="ignore")
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(SCALES):
        rng = np.random.default_rng(index)
        blocks = blocks_of(name, rng)
        weights = dequantize(blocks, T[name]).astype("<f4")
        (folder / f"{name}.dequant").write_bytes(blocks.tobytes() + weights.tobytes())
        if name in ENCODED:
            x = weights_for(name, rng)
            (folder / f"{name}.quant").write_bytes(x.astype("<f4").tobytes() + quantize(x, T[name]).tobytes())


main(Path(sys.argv[1]))
