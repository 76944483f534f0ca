#!/usr/bin/env python3
"""Writes tests/data/models: tiny random models and the logits that reference.py gives for them.

    model_goldens.py tests/data/models

Each model is there for one branch of the forward pass. The weights are random but their scales are chosen: the
attention is neither flat nor one-hot, so an error in any angle, head or bias shows in the logits. Keys and values are
rounded to f16, as skiff's cache stores them: that is the largest difference otherwise, and would hide small errors.
"""
import argparse
import json
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from reference import Model, window_logits

D, VOCAB, TOKENS = 64, 96, 40
IDS = [(37 * i + 11 + i * i // 7) % VOCAB for i in range(TOKENS)]


def shape(layers=2, ffn=64, heads=4, kv_heads=2, head_dim=16):
    return dict(layers=layers, ffn=ffn, heads=heads, kv_heads=kv_heads, head_dim=head_dim)


def scaling(kind, **keys):
    return {"rope.scaling.type": kind, **{f"rope.scaling.{k}": v for k, v in keys.items()}}


MODELS = {
    "llama": dict(shape=shape(layers=3, ffn=96)),
    "linear": dict(keys=scaling("linear", factor=4.0)),
    # The ramp between kept and divided pairs covers pairs 1 to 4 of 8.
    "yarn": dict(keys=scaling("yarn", factor=4.0, original_context_length=512, attn_factor=1.1,
                              yarn_beta_fast=16.0, yarn_beta_slow=2.0)),
    "rope_freqs": dict(factors=np.array([1, 1, 1.5, 2, 3, 5, 8, 8], np.float32)),
    # Query columns are not the embedding's: 3 heads of 32, of which 24 elements turn.
    "key_length": dict(shape=shape(heads=3, kv_heads=1, head_dim=32), untied=True,
                       keys={"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 24,
                             "rope.freq_base": 500000.0}),
    "qwen2": dict(arch="qwen2", biases=True),
}


def write(path, seed, arch="llama", shape=shape(), keys={}, factors=None, untied=False, biases=False):
    rng = np.random.default_rng(seed)
    w = GGUFWriter(path, arch)
    q, kv = shape["heads"] * shape["head_dim"], shape["kv_heads"] * shape["head_dim"]
    w.add_context_length(2048)
    w.add_embedding_length(D)
    w.add_block_count(shape["layers"])
    w.add_feed_forward_length(shape["ffn"])
    w.add_head_count(shape["heads"])
    w.add_head_count_kv(shape["kv_heads"])
    w.add_layer_norm_rms_eps(1e-5)
    for key, value in keys.items():
        add = {str: w.add_string, int: w.add_uint32, float: w.add_float32}[type(value)]
        add(f"{arch}.{key}", value)

    def vector(name, n, mean, std):
        w.add_tensor(name, rng.normal(mean, std, n).astype(np.float32))

    def matrix(name, outputs, inputs, gain=1.0):
        w.add_tensor(name, rng.normal(0, gain / inputs**0.5, (outputs, inputs)).astype(np.float16))

    matrix("token_embd.weight", VOCAB, D, gain=4.0)
    for i in range(shape["layers"]):
        vector(f"blk.{i}.attn_norm.weight", D, 1, 0.2)
        matrix(f"blk.{i}.attn_q.weight", q, D, gain=1.5)
        matrix(f"blk.{i}.attn_k.weight", kv, D, gain=1.5)
        matrix(f"blk.{i}.attn_v.weight", kv, D)
        matrix(f"blk.{i}.attn_output.weight", D, q)
        if biases:
            for part, n in (("q", q), ("k", kv), ("v", kv)):
                vector(f"blk.{i}.attn_{part}.bias", n, 0, 0.5)
        vector(f"blk.{i}.ffn_norm.weight", D, 1, 0.2)
        matrix(f"blk.{i}.ffn_gate.weight", shape["ffn"], D, gain=1.5)
        matrix(f"blk.{i}.ffn_up.weight", shape["ffn"], D)
        matrix(f"blk.{i}.ffn_down.weight", D, shape["ffn"])
    vector("output_norm.weight", D, 1, 0.2)
    if untied:
        matrix("output.weight", VOCAB, D)
    if factors is not None:
        w.add_tensor("rope_freqs.weight", factors)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ids.json").write_text(json.dumps(IDS) + "\n")
    for seed, (name, options) in enumerate(MODELS.items()):
        path = folder / f"{name}.gguf"
        write(path, seed, **options)
        logits = next(window_logits(Model(path, half_cache=True), np.array([IDS])))
        logits.astype("<f4").tofile(folder / f"{name}.logits")
        print(f"{name:10} {path.stat().st_size} bytes, logits {logits.std():.2f} rms, top {logits.max(-1).mean():.2f}")


if __name__ == "__main__":
    main()
