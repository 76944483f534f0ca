"""Makes small random checkpoints with trained tokenizers, and what transformers computes with them.

    python make_checkpoints.py TEXT OUT [SEED]

Writes OUT/NAME for each of three models: the checkpoint as save_pretrained does, `expected.json` (texts and their ids,
with special tokens) and `expected.logits` (float32 [tokens, vocab] of the first text). Needs torch, transformers,
tokenizers and sentencepiece. `tests/data/hf` was written by it with seed 1.
"""

import io
import json
import pathlib
import sys

import sentencepiece
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
TEXTS = [
    "Alice was tired of it",
    "It's 12345 rabbits,  isn't it?\n\n\tYes: ünïcödé 你好 🐇!",
    " leading and trailing ",
    "<|begin|>not special?<|end|>",
]
VOCAB = 320
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=512)


def byte_level(text, digits, specials, bos):
    """A byte-level BPE tokenizer, trained."""
    tok = Tokenizer(models.BPE(ignore_merges=bos is not None))
    if bos is None:
        tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT.replace("DIGITS", digits)), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=specials,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator([text], trainer)
    if bos is not None:
        tok.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tok.token_to_id(bos))])])
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token=bos, eos_token=specials[-1])


def expect(model, ids_of, folder):
    """What transformers computes in f32."""
    ids = [ids_of(text) for text in TEXTS]
    with torch.no_grad():
        logits = model(torch.tensor([ids[0]])).logits[0]
    (folder / "expected.logits").write_bytes(logits.float().numpy().tobytes())
    expected = {"texts": TEXTS, "ids": ids}
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False))


def save(model, folder, shard="1GB"):
    """Random weights large enough that every one of them shows in the logits, in BF16."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            std = 0.3 if p.dim() == 1 else 1.5 / p.shape[-1] ** 0.5
            p.copy_((torch.randn_like(p) * std + (1 if "norm" in name else 0)).bfloat16().float())
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard)
    # Read again: the conversion has rounded the rotary frequencies of this one too.
    return type(model).from_pretrained(folder, dtype=torch.float32).eval()


def llama(text, folder):
    tok = byte_level(text, "{1,3}", ["<|begin|>", "<|end|>"], "<|begin|>")
    tok.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=rope, tie_word_embeddings=False,
                         bos_token_id=0, eos_token_id=1)
    model = save(LlamaForCausalLM(config), folder, "40KB")
    tok.save_pretrained(folder)
    expect(model, lambda t: tok(t).input_ids, folder)


def qwen2(text, folder):
    tok = byte_level(text, "", ["<|end|>"], None)
    config = Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    model = save(Qwen2ForCausalLM(config), folder)
    tok.save_pretrained(folder)
    expect(model, lambda t: tok(t).input_ids, folder)


def mistral(text, folder):
    spm = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.split("\n")), model_writer=spm, vocab_size=VOCAB, model_type="bpe",
        byte_fallback=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        character_coverage=0.99, minloglevel=2)
    shape = {**SHAPE, "num_hidden_layers": 1}
    config = MistralConfig(**shape, num_key_value_heads=4, head_dim=16, tie_word_embeddings=False, bos_token_id=1,
                           eos_token_id=2)
    model = save(MistralForCausalLM(config), folder)
    (folder / "tokenizer.model").write_bytes(spm.getvalue())
    config = {"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    processor = sentencepiece.SentencePieceProcessor(model_proto=spm.getvalue())
    expect(model, lambda t: [1] + processor.encode(t), folder)


def main():
    text = pathlib.Path(sys.argv[1]).read_text()[:60000]
    torch.manual_seed(int(sys.argv[3]) if len(sys.argv) > 3 else 1)
    for make in (llama, qwen2, mistral):
        folder = pathlib.Path(sys.argv[2]) / make.__name__
        folder.mkdir(parents=True, exist_ok=True)
        make(text, folder)


main()
