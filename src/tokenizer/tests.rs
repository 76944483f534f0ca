use super::*;

/// Pieces with their scores and kinds, and the byte tokens of an emoji and a line break.
pub(crate) fn spm_source() -> VocabSource {
    let mut tokens: Vec<(String, f32, TokenKind)> = vec![
        ("<unk>".into(), 0.0, TokenKind::Unknown),
        ("<s>".into(), 0.0, TokenKind::Control),
        ("</s>".into(), 0.0, TokenKind::Control),
    ];
    tokens.extend((0..=255u8).map(|b| (format!("<0x{b:02X}>"), 0.0, TokenKind::Byte)));
    let pieces = [
        "\u{2581}",
        "a",
        "b",
        "<",
        "s",
        ">",
        "/",
        "0",
        "x",
        "A",
        "ab",
        "\u{2581}ab",
        "\u{2581}a",
        "<s",
        "s>",
    ];
    tokens.extend(pieces.iter().enumerate().map(|(i, p)| ((*p).to_owned(), -(i as f32), TokenKind::Normal)));
    tokens.push(("<tool>".into(), 0.0, TokenKind::UserDefined));
    VocabSource {
        model: "llama".into(),
        tokens: tokens.iter().map(|(text, ..)| text).collect(),
        scores: Some(tokens.iter().map(|&(_, score, _)| score).collect()),
        kinds: Some(tokens.iter().map(|&(.., kind)| kind).collect()),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        ..VocabSource::default()
    }
}

/// All 256 bytes, a few merges, and the markers of ChatML.
pub(crate) fn bpe_source() -> VocabSource {
    let chars = ByteChars::new();
    let alphabet: String =
        (0..0x144).filter_map(char::from_u32).filter(|&c| chars.byte(c).is_some()).collect();
    assert_eq!(alphabet.chars().count(), 256);
    let mut tokens: Vec<String> = alphabet.chars().map(String::from).collect();
    let mut kinds = vec![TokenKind::Normal; 256];
    for (text, kind) in [
        ("he", TokenKind::Normal),
        ("\u{120}he", TokenKind::Normal),
        ("<|im_start|>", TokenKind::Control),
        ("<|im_end|>", TokenKind::UserDefined), // as some files have it
        ("<|im", TokenKind::Control),
        ("<think>", TokenKind::UserDefined),
    ] {
        tokens.push(text.into());
        kinds.push(kind);
    }
    VocabSource {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: tokens.iter().collect(),
        kinds: Some(kinds),
        merges: ["h e", "\u{120} he", "no where", "he", " ", "\u{120} ", "h \u{120}he\u{120}he"]
            .iter()
            .collect(),
        ..VocabSource::default()
    }
}

fn plain(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, EncodeOptions::default()).unwrap()
}

fn texts(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
    ids.iter().map(|&id| tokenizer.token_text(id).unwrap().into_owned()).collect()
}

#[test]
fn sentencepiece_merges_falls_back_to_bytes_and_gives_the_text_again() {
    let t = Tokenizer::from_source(&spm_source()).unwrap();
    assert_eq!(texts(&t, &plain(&t, "ab a")), ["\u{2581}ab", "\u{2581}a"]);
    assert_eq!(texts(&t, &plain(&t, "\n")), ["\u{2581}", "<0x0A>"]);
    assert_eq!(texts(&t, &plain(&t, "a\u{1f999}")).len(), 5);
    for text in ["", " ", "  ab", "ab  ", "\u{1f999} ab\n", "<0x0A>", "<s>", "a<tool> b<tool>", "\u{2582}"] {
        assert_eq!(t.decode(&plain(&t, text), DecodeOptions::default()), text.as_bytes(), "{text:?}");
    }
}

#[test]
fn spelled_control_and_byte_tokens_stay_text() {
    let t = Tokenizer::from_source(&spm_source()).unwrap();
    assert_eq!(texts(&t, &plain(&t, "<s>")), ["\u{2581}", "<s", ">"]);
    assert!(plain(&t, "<0x0A>").iter().all(|&id| t.kind(id) == Some(TokenKind::Normal)));
    let options = EncodeOptions { add_special: true, parse_special: true };
    let ids = t.encode("a</s>b", options).unwrap();
    assert_eq!(texts(&t, &ids), ["<s>", "\u{2581}a", "</s>", "\u{2581}", "b"]);
    assert_eq!(t.decode(&ids, DecodeOptions { show_control: true }), b"<s>a</s>b");
    assert_eq!(t.decode(&ids, DecodeOptions::default()), b"a b");
}

#[test]
fn text_beyond_the_vocabulary_is_one_unknown_token() {
    let mut source = spm_source();
    source.tokens = source.tokens.iter().map(|t| if t.starts_with(b"<0x") { b"<gone>" } else { t }).collect();
    let t = Tokenizer::from_source(&source).unwrap();
    assert_eq!(texts(&t, &plain(&t, "a\u{1f999}\u{1f999}b")), ["\u{2581}a", "<unk>", "b"]);
}

#[test]
fn byte_level_bpe_merges_by_rank_and_survives_unsound_merges() {
    let t = Tokenizer::from_source(&bpe_source()).unwrap();
    assert_eq!(texts(&t, &plain(&t, "he he")), ["he", "\u{120}he"]);
    for text in ["", "he\u{1f999}\n\0\u{7f}", " \u{a0}x", "<|im_end|>", "a<think>b"] {
        assert_eq!(t.decode(&plain(&t, text), DecodeOptions::default()), text.as_bytes(), "{text:?}");
    }
}

#[test]
fn special_tokens_are_found_longest_first() {
    let t = Tokenizer::from_source(&bpe_source()).unwrap();
    let ids = t.encode("<|im_end|><|imx", EncodeOptions { add_special: false, parse_special: true }).unwrap();
    assert_eq!(texts(&t, &ids), ["<|im_end|>", "<|im", "x"]);
    let end = t.id_of("<|im_end|>").unwrap();
    assert!(t.is_control(end) && t.is_end_of_generation(end));
    assert!(!t.is_end_of_generation(t.id_of("<|im_start|>").unwrap()));
    let think = t.id_of("<think>").unwrap();
    assert!(plain(&t, "a<think>").contains(&think));
}

#[test]
fn streams_give_whole_characters_and_lose_nothing() {
    let t = Tokenizer::from_source(&bpe_source()).unwrap();
    let mut stream = t.detokenizer();
    let parts: Vec<String> = plain(&t, "\u{1f999}").iter().map(|&id| stream.push(id)).collect();
    assert_eq!(parts, ["", "", "", "\u{1f999}"]);
    let text = "h\u{e9}\u{1f999}he \u{4e2d}";
    let mut streamed: String = plain(&t, text).iter().map(|&id| stream.push(id)).collect();
    streamed += &stream.finish();
    assert_eq!(streamed, text);
    assert_eq!(stream.push(t.id_of("<|im_start|>").unwrap()), "");
    assert_eq!(t.detokenizer().show_control().push(t.id_of("<|im_start|>").unwrap()), "<|im_start|>");
    assert_eq!(stream.push(u32::MAX), "");
}

#[test]
fn broken_bytes_stream_as_lossy_decoding_has_them() {
    let samples: [&[u8]; 7] = [
        b"a\xf0\x9f\xa6",
        b"\xf0\x9f\xa6\x99",
        b"\xf0\x9fx\x80\x80",
        b"\xff\xfe\xf0",
        b"\xed\xa0\x80",
        b"\xe4\xb8\xe4\xb8\xad",
        b"",
    ];
    for bytes in samples {
        for cut in 1..=bytes.len().max(1) {
            let mut stream = Utf8Stream::default();
            let mut text: String = bytes.chunks(cut).map(|chunk| stream.push(chunk)).collect();
            text += &stream.finish();
            assert_eq!(text, String::from_utf8_lossy(bytes), "{bytes:?} by {cut}");
        }
    }
}

#[test]
fn faults_of_a_vocabulary_are_named() {
    let fault = |change: fn(&mut VocabSource)| {
        let mut source = spm_source();
        change(&mut source);
        Tokenizer::from_source(&source).unwrap_err().to_string()
    };
    assert!(fault(|s| s.model = "bert".into()).contains("\"bert\""));
    assert!(fault(|s| s.bos = Some(1 << 20)).contains("1048576"));
    assert!(fault(|s| s.scores = None).contains("scores"));
    assert!(fault(|s| s.scores = Some(vec![1.0])).starts_with("1 scores"));
    assert!(fault(|s| s.kinds = Some(vec![])).starts_with("0 token types"));
    assert!(fault(|s| s.tokens = Default::default()).contains("empty"));
    let unknown = VocabSource { pre: Some("sea-lion".into()), ..bpe_source() };
    assert!(Tokenizer::from_source(&unknown).unwrap_err().to_string().contains("\"sea-lion\""));
}

#[test]
fn every_known_pre_tokenizer_compiles_and_keeps_all_text() {
    let text = "It's 12345 tests,\r\n\r\n  d\u{e9}j\u{e0} vu!  \u{4e2d}\u{6587}\u{3002}\u{1f999}\t== 'RE  \n";
    for name in super::bpe::pre_names() {
        let t = Tokenizer::from_source(&VocabSource { pre: Some(name.into()), ..bpe_source() }).unwrap();
        assert_eq!(t.decode(&plain(&t, text), DecodeOptions::default()), text.as_bytes(), "{name}");
    }
}

#[test]
fn hostile_vocabularies_and_texts_do_no_harm() {
    let odd: Vec<Vec<u8>> = vec![
        vec![],
        vec![0xff],
        b"a".to_vec(),
        b"a".to_vec(),
        b"<0x".to_vec(),
        b"<0x+1>".to_vec(),
        vec![b'a'; 5000],
    ];
    for kind in
        [TokenKind::Normal, TokenKind::Control, TokenKind::Byte, TokenKind::Unknown, TokenKind::UserDefined]
    {
        for model in ["llama", "gpt2"] {
            let source = VocabSource {
                model: model.into(),
                tokens: odd.iter().collect(),
                scores: Some(vec![f32::NAN; odd.len()]),
                kinds: Some(vec![kind; odd.len()]),
                merges: odd.iter().collect(),
                unk: Some(0),
                add_bos: Some(true),
                ..VocabSource::default()
            };
            let t = Tokenizer::from_source(&source).unwrap();
            for text in ["a", "\0", "<0x41>", &"a".repeat(20_000)] {
                t.encode(text, EncodeOptions { add_special: true, parse_special: true }).unwrap();
            }
            t.decode(&[0, 1, 6, 7, u32::MAX], DecodeOptions { show_control: true });
        }
    }
    let llama3 = Tokenizer::from_source(&VocabSource { pre: Some("llama3".into()), ..bpe_source() }).unwrap();
    let spaces = " ".repeat(3_000_000) + "x he";
    let ids = plain(&llama3, &spaces);
    assert_eq!(llama3.token_text(ids[ids.len() - 1]).unwrap(), "\u{120}he");
    assert_eq!(llama3.decode(&ids, DecodeOptions::default()).len(), spaces.len());
}
