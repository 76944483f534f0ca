//! tokenizer (under construction).
