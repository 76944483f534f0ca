//! Keeps text from users text.
//!
//! A template joins its own control tokens with contents that may spell control tokens too, whole or in part. So each
//! content gets a guard, a character that occurs nowhere else, directly after every character that a control token
//! could start with. No control token holds the guard, so none can start inside a content, whatever the template cuts
//! away or joins. A token could still start in the template's text and end in a content; contents that begin like
//! the rest of a token get a guard in front.
//!
//! Guards stand next to visible characters and within the content, so that templates can trim it.

/// Characters that mean nothing in any text (Unicode's noncharacters).
fn candidates() -> impl Iterator<Item = char> {
    ('\u{fdd0}'..='\u{fdef}').chain((1..=16u32).filter_map(|plane| char::from_u32((plane << 16) | 0xfffe)))
}

/// A character that occurs in none of the texts.
pub(super) fn choose<'t>(texts: impl Iterator<Item = &'t str> + Clone) -> Option<char> {
    candidates().find(|&guard| !texts.clone().any(|text| text.contains(guard)))
}

/// Guards a content against these control tokens.
///
/// Templates look for tags such as `</think>` in contents, so a tag that the template's source holds stays whole,
/// unless a control token starts with the same characters.
pub(super) fn protect(content: &str, controls: &[String], template: &str, guard: char) -> String {
    let mut out = String::with_capacity(content.len() + 16);
    let body_at = content.len() - content.trim_start().len();
    for (at, c) in content.char_indices() {
        let rest = content.get(at..).unwrap_or_default();
        if (at == 0 || at == body_at) && ends_a_token(rest, controls) {
            out.push(guard);
        }
        out.push(c);
        if controls.iter().any(|token| token.starts_with(c)) && !is_template_tag(rest, controls, template) {
            out.push(guard);
        }
    }
    out
}

/// Whether a text begins with what is missing of some token after its first characters, or is all inside one.
fn ends_a_token(text: &str, controls: &[String]) -> bool {
    let trimmed = text.trim_end();
    controls.iter().any(|token| {
        token.char_indices().skip(1).any(|(at, _)| {
            let tail = token.get(at..).unwrap_or_default();
            text.starts_with(tail) || (!trimmed.is_empty() && tail.starts_with(trimmed))
        })
    })
}

/// Whether a text begins with a tag, `<name>` or `</name>`, that is whole in the template and in no control token.
fn is_template_tag(text: &str, controls: &[String], template: &str) -> bool {
    const MAX_TAG_BYTES: usize = 32;
    let Some(inner) = text.strip_prefix('<') else { return false };
    let name = inner.strip_prefix('/').unwrap_or(inner);
    let name_len =
        name.bytes().take(MAX_TAG_BYTES).take_while(|b| b.is_ascii_lowercase() || *b == b'_').count();
    let tag_len = text.len() - name.len() + name_len + 1;
    let Some(tag) = text.get(..tag_len).filter(|tag| name_len > 0 && tag.ends_with('>')) else {
        return false;
    };
    !controls.iter().any(|token| token.contains(tag) || tag.contains(token.as_str()))
        && template.contains(tag)
}
