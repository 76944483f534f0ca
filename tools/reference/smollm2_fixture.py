#!/usr/bin/env python3
"""Writes tests/data/smollm2_reference.json: what reference.py says of the default model, for tests/smollm2.rs.

    smollm2_fixture.py SmolLM2-135M-Instruct.Q4_1.gguf ../../tests/data/alice.txt -o ../../tests/data/smollm2_reference.json

`ids`: the first 512 tokens of the text. `positions`, for each position from `first` on but the last: the log-probability
of the token that follows, then the 32 most likely tokens and their log-probabilities. `greedy`: a prompt and the
most likely continuation. `cosines`: mean cos(h, h + FFN) over all 512 positions, by layer.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from reference import Model, cosine, hidden, log_softmax, output_matrix

TOKENS, FIRST, TOP = 512, 255, 32
PROMPT, CONTINUATION = "1, 2, 3, 4, 5,", 24  # no near ties on the way: every margin is 1.9 or more


def tokenize(model, text):
    ids = subprocess.run([sys.executable, Path(__file__).with_name("ids.py"), model, text],
                         check=True, capture_output=True, text=True).stdout
    return json.loads(ids)


def continuation(model, ids):
    ids, output = list(ids), output_matrix(model)
    for _ in range(CONTINUATION):
        ids.append(int((output @ hidden(model, np.array([ids]))[0, -1]).argmax()))
    return ids


def evaluate(model, ids):
    cosines = []

    def policy(layer, h, ffn):
        out = h + ffn(h)
        cosines.append(float(cosine(h, out).mean()))
        return out

    rows = hidden(model, np.array([ids]), policy)[0, FIRST:-1]
    return log_softmax((rows @ output_matrix(model).T).astype(np.float64)), cosines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    prompt = args.out.with_suffix(".prompt")
    prompt.write_text(PROMPT)
    ids, start = tokenize(args.model, args.text)[:TOKENS], tokenize(args.model, prompt)
    prompt.unlink()
    model = Model(args.model, keep=True)
    logs, cosines = evaluate(model, ids)
    positions = []
    for row, target in zip(logs, ids[FIRST + 1 :]):
        top = np.argsort(-row)[:TOP]
        positions.append([round(row[target], 6), top.tolist(), np.round(row[top], 6).tolist()])
    fixture = dict(first=FIRST, prompt=PROMPT, greedy=continuation(model, start), prompt_tokens=len(start),
                   cosines=[round(c, 5) for c in cosines], ids=ids)
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in fixture.items()]
    rows = ",\n".join(json.dumps(p, separators=(",", ":")) for p in positions)
    args.out.write_text("{" + ",\n".join(lines) + f',\n"positions": [\n{rows}\n]}}\n')
    nll = -np.mean([p[0] for p in positions])
    print(f"{len(positions)} positions, perplexity {np.exp(nll):.4f}")


if __name__ == "__main__":
    main()
