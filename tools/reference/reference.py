#!/usr/bin/env python3
"""Evaluates a GGUF exactly, in plain numpy and f32: the yardstick that skiff is compared with.

Weights are decoded by the Python package `gguf` and activations are never quantised, so what differs from
skiff is skiff's rounding. Slow and simple on purpose; README.md shows its use.
"""
import argparse
import json
from math import ceil, floor, log, pi, sqrt
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize

BATCH = 8  # windows evaluated together: each layer's weights are decoded once for all of them


class Model:
    """Metadata and tensors of a GGUF. Tensors are decoded when asked for, and kept only with `keep`."""

    def __init__(self, path, keep=False, half_cache=False):
        self.half_cache = half_cache  # keys and values rounded to f16, as a cache stores them
        reader = GGUFReader(path)
        self.fields = reader.fields
        self.tensors = {t.name: t for t in reader.tensors}
        self.kept = {} if keep else None
        self.arch = self.get("general.architecture")
        if self.arch not in ("llama", "qwen2"):
            raise SystemExit(f"architecture {self.arch}: only llama and qwen2 are known here")
        self.layers = self.hyper("block_count")
        self.heads = self.hyper("attention.head_count")
        self.kv_heads = self.hyper("attention.head_count_kv", self.heads)
        self.head_dim = self.hyper("attention.key_length", self.hyper("embedding_length") // self.heads)
        self.eps = np.float32(self.hyper("attention.layer_norm_rms_epsilon"))

    def get(self, key, default=None):
        return self.fields[key].contents() if key in self.fields else default

    def hyper(self, key, default=None):
        return self.get(f"{self.arch}.{key}", default)

    def tensor(self, name):
        """f32 array of shape [outputs, inputs], or None if the file has no such tensor."""
        if self.kept is not None and name in self.kept:
            return self.kept[name]
        t = self.tensors.get(name)
        if t is None:
            return None
        array = dequantize(t.data, t.tensor_type).reshape(t.shape[::-1])
        if self.kept is not None:
            self.kept[name] = array
        return array

    def linear(self, x, name):
        y = x @ self.tensor(f"{name}.weight").T
        bias = self.tensor(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, x, name):
        mean_square = np.mean(x * x, axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.eps) * self.tensor(f"{name}.weight")


# ---- rope


def yarn_ramp(model, pairs, dims, base):
    """1 for the fast pairs, which keep their frequency; 0 for the slow ones, which are interpolated."""
    context = model.hyper("rope.scaling.original_context_length", model.hyper("context_length"))

    def pair_turning(times):
        return dims * log(context / (times * 2 * pi)) / (2 * log(base))

    low = max(0, floor(pair_turning(model.hyper("rope.scaling.yarn_beta_fast", 32.0))))
    high = min(dims - 1, ceil(pair_turning(model.hyper("rope.scaling.yarn_beta_slow", 1.0))))
    return 1 - np.clip((pairs - low) / max(0.001, high - low), 0, 1)


def rope_table(model, length):
    """cos and sin, [position, pair], as llama.cpp scales them."""
    dims = model.hyper("rope.dimension_count", model.head_dim)
    base = model.hyper("rope.freq_base", 10000.0)
    pairs = np.arange(dims // 2)
    frequency = base ** (-2.0 * pairs / dims)
    factors = model.tensor("rope_freqs.weight")
    if factors is not None:
        frequency = frequency / factors
    kind = model.hyper("rope.scaling.type", "linear")  # older files have the factor alone
    factor = model.hyper("rope.scaling.factor", model.hyper("rope.scale_linear")) or 1.0
    magnitude = model.hyper("rope.scaling.attn_factor", 1.0)
    if kind == "linear":
        frequency = frequency / factor
    elif kind == "yarn":
        ramp = yarn_ramp(model, pairs, dims, base)
        frequency = frequency / factor * (1 - ramp) + frequency * ramp
        magnitude *= 1 + 0.1 * log(factor)
    elif kind != "none":
        raise SystemExit(f"rope scaling {kind} is not known here")
    angle = np.arange(length)[:, None] * frequency
    return (magnitude * np.cos(angle)).astype(np.float32), (magnitude * np.sin(angle)).astype(np.float32)


def rope(x, table, interleaved):
    """Rotates x [tokens, heads, head_dim]: pairs (2i, 2i+1) if interleaved, else (i, i + dims/2)."""
    cos, sin = (t[:, None, :] for t in table)
    half = cos.shape[-1]
    i = np.arange(half)
    first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
    out = x.copy()  # dimensions beyond the rotated ones pass through
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


# ---- the model


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attend(model, q, k, v, table):
    """Causal attention of one window; q, k, v are [tokens, heads * head_dim]."""
    n, d = len(q), model.head_dim
    interleaved = model.arch == "llama"  # its converter permutes q and k
    q = rope(q.reshape(n, model.heads, d), table, interleaved)
    k = rope(k.reshape(n, model.kv_heads, d), table, interleaved)
    v = v.reshape(n, model.kv_heads, -1)
    if model.half_cache:
        k, v = (x.astype(np.float16).astype(np.float32) for x in (k, v))
    future = np.triu(np.full((n, n), -np.inf, np.float32), 1)
    out = np.empty((n, model.heads, v.shape[-1]), np.float32)
    for head in range(model.heads):
        shared = head // (model.heads // model.kv_heads)
        scores = q[:, head] @ k[:, shared].T / np.float32(sqrt(d)) + future
        out[:, head] = softmax(scores) @ v[:, shared]
    return out.reshape(n, -1)


def attention(model, layer, x, table):
    n = model.norm(x, f"blk.{layer}.attn_norm")
    q, k, v = (model.linear(n, f"blk.{layer}.attn_{part}") for part in "qkv")
    out = np.stack([attend(model, *window, table) for window in zip(q, k, v)])
    return model.linear(out, f"blk.{layer}.attn_output")


def feed_forward(model, layer, h):
    n = model.norm(h, f"blk.{layer}.ffn_norm")
    gate, up = (model.linear(n, f"blk.{layer}.ffn_{part}") for part in ("gate", "up"))
    with np.errstate(over="ignore"):  # exp(-gate) may be infinite: the quotient is then the zero it should be
        silu = gate / (1 + np.exp(-gate))
    return model.linear(silu * up, f"blk.{layer}.ffn_down")


def run_all(layer, h, ffn):
    """The full model. A policy is a function like this one, from the residual h after attention to h'."""
    return h + ffn(h)


def hidden(model, windows, policy=run_all):
    """Normed last residual [windows, tokens, width] of windows of ids, each from scratch."""
    x = model.tensor("token_embd.weight")[windows]
    table = rope_table(model, windows.shape[1])
    for layer in range(model.layers):
        h = x + attention(model, layer, x, table)
        x = policy(layer, h, lambda rows: feed_forward(model, layer, rows))
    return model.norm(x, "output_norm")


def output_matrix(model):
    tied = "output.weight" not in model.tensors
    return model.tensor("token_embd.weight" if tied else "output.weight")


def batches(windows):
    return np.array_split(windows, ceil(len(windows) / BATCH))


def window_logits(model, windows, policy_of_batch=lambda: run_all):
    """Yields the logits [tokens, vocab] of each window in turn."""
    output = output_matrix(model).T
    for batch in batches(windows):
        for rows in hidden(model, batch, policy_of_batch()):
            yield rows @ output


# ---- the skip rule of FFN-SkipLLM


def cosine(a, b):
    dot = np.sum(a * b, axis=-1)
    return dot / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


class SkipRule:
    """Once cos(h, h + FFN) of a token reaches the threshold, its next k FFNs are skipped.

    The state (the budget of FFNs to skip) belongs to one token: it starts at nothing before layer 0 and
    does not carry over to the next token. That, and that all ids are given, lets a layer be evaluated for
    all tokens at once. Attention always runs; skipping changes its K and V only through the residual.
    """

    def __init__(self, layers, threshold, k, warm_up, cold):
        self.threshold, self.k, self.warm_up = threshold, k, warm_up
        self.cold_s, self.cold_e = cold or (0, layers)
        self.skipped = np.zeros(layers, int)  # tokens, by layer
        self.seen = self.warm = 0

    def start(self):
        """A policy for one batch of windows."""
        self.budget = None
        return self

    def __call__(self, layer, h, ffn):
        if self.budget is None:
            self.budget = np.zeros(h.shape[:2], int)
            self.seen += self.budget.size
            self.warm += h.shape[0] * min(self.warm_up, h.shape[1])
        always = np.broadcast_to(np.arange(h.shape[1]) < self.warm_up, h.shape[:2])
        if not self.cold_s <= layer < self.cold_e:
            always = np.ones(h.shape[:2], bool)
        skip = ~always & (self.budget > 0)
        self.budget[skip] -= 1
        self.skipped[layer] += skip.sum()
        run = ~skip
        out = h.copy()
        out[run] += ffn(h[run])
        fired = run & ~always
        fired[fired] = cosine(h[fired], out[fired]) >= self.threshold
        self.budget[fired] = self.k
        return out


# ---- measures


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class Comparison:
    """Collects what one or two sets of logits say of the same windows, at positions first .. c - 2."""

    def __init__(self, first):
        self.first, self.nll, self.kl, self.same = first, ([], []), [], []

    def add(self, ids, *logits):
        scored = slice(self.first, len(ids) - 1)  # the last position's successor lies outside
        logs = [log_softmax(l[scored]) for l in logits]
        target = ids[self.first + 1 :]
        for nll, lp in zip(self.nll, logs):
            nll.append(-lp[np.arange(len(target)), target].astype(np.float64))
        if len(logs) == 2:
            a, b = logs
            self.kl.append(np.sum(np.exp(a) * (a - b), axis=-1, dtype=np.float64))
            self.same.append(a.argmax(-1) == b.argmax(-1))

    def perplexity(self, which=0):
        return float(np.exp(np.mean(np.concatenate(self.nll[which]))))

    def report(self):
        kl, same = np.concatenate(self.kl), np.concatenate(self.same)
        a, b = self.perplexity(0), self.perplexity(1)
        print(f"positions        {len(kl)}")
        print(f"perplexity       A {a:.4f}  B {b:.4f}  B/A {b / a:.4f}")
        print(f"KL(A||B)         mean {kl.mean():.6f}  p99 {np.percentile(kl, 99):.6f}")
        print(f"same top-1       {100 * same.mean():.2f} %")


# ---- commands


def load_ids(path):
    path = Path(path)
    ids = np.load(path) if path.suffix == ".npy" else json.loads(path.read_text())
    return np.asarray(ids, dtype=np.int64)


def windows_of(args):
    ids = load_ids(args.ids)
    count = min(len(ids) // args.context, args.chunks or len(ids))
    if count == 0:
        raise SystemExit(f"{len(ids)} ids do not fill a window of {args.context}")
    return ids[: count * args.context].reshape(count, args.context)


def first_scored(args):
    return args.context // 2 if args.first_scored is None else args.first_scored


def cmd_logits(args):
    ids = np.array(json.loads(args.ids)) if args.ids.startswith("[") else load_ids(args.ids)
    logits = next(window_logits(Model(args.model), ids[None]))
    np.save(args.out, logits)


def cmd_generate(args):
    model = Model(args.model, keep=True)
    ids = json.loads(args.ids) if args.ids.startswith("[") else load_ids(args.ids).tolist()
    output = output_matrix(model)
    for _ in range(args.count):
        last = hidden(model, np.array([ids]))[0, -1]
        ids.append(int((output @ last).argmax()))
    print(json.dumps(ids))


def cmd_ppl(args):
    windows, store = windows_of(args), None
    measure = Comparison(first_scored(args))
    for i, logits in enumerate(window_logits(Model(args.model), windows)):
        if args.out and store is None:
            shape = (windows.size, logits.shape[-1])
            store = np.lib.format.open_memmap(args.out, "w+", np.float32, shape)
        if args.out:
            store[i * args.context : (i + 1) * args.context] = logits
        measure.add(windows[i], logits)
        print(f"[{i + 1}/{len(windows)}] perplexity {measure.perplexity():.4f}", flush=True)


def cmd_cosine(args):
    model, windows = Model(args.model), windows_of(args)
    total = np.zeros(model.layers)

    def policy(layer, h, ffn):
        out = h + ffn(h)
        total[layer] += cosine(h, out)[:, args.first :].sum()
        return out

    for batch in batches(windows):
        hidden(model, batch, policy)
    tokens = len(windows) * (args.context - args.first)
    for layer, mean in enumerate(total / tokens):
        print(f"{layer:3} {mean:.4f}")


def cmd_compare(args):
    windows = windows_of(args)
    a, b = (np.load(p, mmap_mode="r") for p in (args.a, args.b))
    measure = Comparison(first_scored(args))
    for i, ids in enumerate(windows[: min(len(a), len(b)) // args.context]):
        rows = slice(i * args.context, (i + 1) * args.context)
        measure.add(ids, a[rows], b[rows])
    measure.report()


def cmd_skip(args):
    model, windows = Model(args.model), windows_of(args)
    cold = [int(n) for n in args.cold.split(",")] if args.cold else None
    rule = SkipRule(model.layers, args.threshold, args.k, args.warm_up, cold)
    measure = Comparison(first_scored(args))
    full, skipping = window_logits(model, windows), window_logits(model, windows, rule.start)
    for ids, a, b in zip(windows, full, skipping):
        measure.add(ids, a, b)
    total = rule.skipped.sum() / model.layers
    print(f"FFNs skipped     {100 * total / rule.seen:.2f} % of all, "
          f"{100 * total / max(1, rule.seen - rule.warm):.2f} % after the warm-up")
    print("by layer (%)     " + " ".join(f"{100 * n / rule.seen:.0f}" for n in rule.skipped))
    measure.report()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)

    def command(name, run, text, model=True, windowed=True):
        p = commands.add_parser(name, help=text, description=text)
        p.set_defaults(run=run)
        if model:
            p.add_argument("model")
        p.add_argument("--ids", required=True, help=".npy or JSON file of token ids" + ("" if windowed else ", or a JSON list"))
        if windowed:
            p.add_argument("-c", "--context", type=int, default=512, help="tokens of a window (default 512)")
            p.add_argument("--chunks", type=int, help="windows to evaluate (default: all)")
        return p

    def scored(p):
        p.add_argument("--first-scored", type=int, help="first position whose prediction counts (default: half)")
        return p

    p = command("logits", cmd_logits, "logits of every position of one sequence", windowed=False)
    p.add_argument("-o", "--out", required=True)
    p = command("generate", cmd_generate, "greedy continuation, as ids", windowed=False)
    p.add_argument("-n", "--count", type=int, default=32)
    p = scored(command("ppl", cmd_ppl, "perplexity over windows, and their logits"))
    p.add_argument("-o", "--out", help="float32 .npy of [tokens, vocabulary]")
    p = command("cosine", cmd_cosine, "mean cos(h, h + FFN) by layer")
    p.add_argument("--first", type=int, default=0, help="first position counted")
    p = scored(command("compare", cmd_compare, "KL, same top-1 and perplexities of two logit files", model=False))
    p.add_argument("a")
    p.add_argument("b")
    p = scored(command("skip", cmd_skip, "what the skip rule costs against the full model"))
    p.add_argument("--threshold", type=float, default=0.98)
    p.add_argument("-k", "--k", type=int, default=1)
    p.add_argument("--warm-up", type=int, default=32)
    p.add_argument("--cold", metavar="S,E", help="the rule applies to layers S .. E-1 (default: all)")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
