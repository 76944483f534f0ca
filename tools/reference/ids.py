#!/usr/bin/env python3
"""Token ids of a text file by the byte-level BPE in a GGUF (`pip install gguf tokenizers`), or text of ids.

    ids.py MODEL TEXT -o ids.json        ids.py MODEL --decode '[1, 2]'
"""
import argparse
import json
from pathlib import Path

from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE = {
    "smollm": lambda: Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "qwen2": lambda: Sequence([Split(Regex(QWEN2), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]),
}


def tokenizer(path):
    fields = GGUFReader(path).fields
    vocab = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"].contents()]
    bpe = Tokenizer(models.BPE(vocab, merges))
    bpe.pre_tokenizer = PRE[fields["tokenizer.ggml.pre"].contents()]()
    bpe.decoder = decoders.ByteLevel()
    return bpe


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model")
parser.add_argument("text", nargs="?", type=Path)
parser.add_argument("-o", "--out", type=Path)
parser.add_argument("-n", "--count", type=int, help="keep the first N ids")
parser.add_argument("--decode", help="a JSON list of ids")
args = parser.parse_args()
bpe = tokenizer(args.model)
if args.decode:
    print(bpe.decode(json.loads(args.decode)))
else:
    ids = json.dumps(bpe.encode(args.text.read_text()).ids[: args.count])
    args.out.write_text(ids) if args.out else print(ids)
