"""Takes a GGUF model apart to a Hugging Face directory, the way back of `skiff-convert hf`.

    python take_apart.py MODEL.gguf DIR

For `llama` and `qwen2` models with a byte-level BPE tokenizer (smollm, qwen2, llama-bpe). Weights are decoded and
written in F32. Needs numpy, gguf and safetensors.
"""

import json
import pathlib
import sys

import gguf
import numpy as np
from gguf.quants import dequantize
from safetensors.numpy import save_file

NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
TOP = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
       "output.weight": "lm_head.weight"}
DIGITS = {"qwen2": "", "llama-bpe": "{1,3}"}
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def pre_tokenizer(pre):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": pre == "smollm"}
    if pre == "smollm":
        return {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]}
    split = {"type": "Split", "pattern": {"Regex": SPLIT.replace("DIGITS", DIGITS[pre])}, "behavior": "Isolated"}
    return {"type": "Sequence", "pretokenizers": [split, byte_level]}


def halves(w, heads):
    """Neighbours back to halves: what conversion undoes."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def main():
    reader, out = gguf.GGUFReader(sys.argv[1]), pathlib.Path(sys.argv[2])
    out.mkdir(parents=True, exist_ok=True)
    get = lambda key: reader.fields[key].contents() if key in reader.fields else None
    arch = get("general.architecture")
    key = lambda suffix: get(f"{arch}.{suffix}")
    heads, kv_heads = key("attention.head_count"), key("attention.head_count_kv")
    tensors = {}
    for t in reader.tensors:
        w = dequantize(t.data, t.tensor_type).astype(np.float32)
        name = TOP.get(t.name)
        if name is None:
            _, layer, part, kind = t.name.split(".")
            name = f"model.layers.{layer}.{NAMES[part]}.{kind}"
            if arch == "llama" and part in ("attn_q", "attn_k"):
                w = halves(w, heads if part == "attn_q" else kv_heads)
        tensors[name] = np.ascontiguousarray(w)
    save_file(tensors, out / "model.safetensors")

    config = {"architectures": ["LlamaForCausalLM" if arch == "llama" else "Qwen2ForCausalLM"],
              "hidden_act": "silu", "hidden_size": key("embedding_length"), "num_attention_heads": heads,
              "num_key_value_heads": kv_heads, "intermediate_size": key("feed_forward_length"),
              "num_hidden_layers": key("block_count"), "max_position_embeddings": key("context_length"),
              "rms_norm_eps": float(key("attention.layer_norm_rms_epsilon")), "rope_theta": key("rope.freq_base"),
              "vocab_size": int(tensors["model.embed_tokens.weight"].shape[0]),
              "tie_word_embeddings": "lm_head.weight" not in tensors}
    (out / "config.json").write_text(json.dumps(config))

    tokens, kinds = get("tokenizer.ggml.tokens"), get("tokenizer.ggml.token_type")
    added = [{"id": i, "content": t, "special": kinds[i] == 3, "normalized": False}
             for i, t in enumerate(tokens) if kinds[i] in (3, 4)]
    tokenizer = {"added_tokens": added, "pre_tokenizer": pre_tokenizer(get("tokenizer.ggml.pre")),
                 "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens) if kinds[i] == 1},
                           "merges": get("tokenizer.ggml.merges")}}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    name = lambda which: (lambda i: None if i is None else tokens[i])(get(f"tokenizer.ggml.{which}_token_id"))
    settings = {"bos_token": name("bos"), "eos_token": name("eos"), "unk_token": name("unknown"),
                "pad_token": name("padding"), "add_bos_token": get("tokenizer.ggml.add_bos_token"),
                "chat_template": get("tokenizer.chat_template")}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


main()
