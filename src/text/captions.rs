//! Captions and prompts as people have them → as CLIP was trained to read them: HTML's entities and curled quotes are
//! what they stand for, as ftfy 6 mends them. Stable Diffusion's own tokenizer mends text so first.

use std::borrow::Cow;

/// The longest name of an entity that is looked for.
const LONGEST_ENTITY: usize = 24;

/// Entities (`&amp;`, `&#8217;`, `&EACUTE;`) as what they stand for, unless there is a `<` in their line, which then is
/// HTML itself; curled quotes as straight ones. Of what else ftfy does (wrong encodings, ligatures, full width) nothing.
pub(super) fn mended(text: &str) -> Cow<'_, str> {
    let straight = |c: char| match c {
        '\u{2bc}' | '\u{2018}'..='\u{201b}' => '\'',
        '\u{201c}'..='\u{201f}' => '"',
        other => other,
    };
    if !text.chars().any(|c| c == '&' || straight(c) != c) {
        return Cow::Borrowed(text);
    }
    let lines = text.split_inclusive('\n').map(|line| if line.contains('<') { line.into() } else { unescaped(line) });
    lines.flat_map(|line: String| line.chars().map(straight).collect::<Vec<_>>()).collect()
}

/// Until nothing changes: `&amp;quot;` was escaped twice.
fn unescaped(text: &str) -> String {
    let mut text = text.to_string();
    loop {
        let next = without_entities(&text);
        if next == text {
            return next;
        }
        text = next;
    }
}

fn without_entities(text: &str) -> String {
    let mut found = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('&') {
        found.push_str(&rest[..at]);
        rest = &rest[at..];
        match entity(rest).and_then(|entity| Some((entity.len(), meant_by(entity)?))) {
            Some((length, meant)) => {
                found.push_str(&meant);
                rest = &rest[length..];
            }
            None => {
                found.push('&');
                rest = &rest[1..];
            }
        }
    }
    found + rest
}

/// `&name;` or `&#number;` at the beginning of a text.
fn entity(text: &str) -> Option<&str> {
    let inner = text.strip_prefix('&')?;
    let name = inner.strip_prefix('#').unwrap_or(inner);
    let length = name.bytes().take_while(u8::is_ascii_alphanumeric).count();
    let end = text.len() - name.len() + length;
    ((1..=LONGEST_ENTITY).contains(&length) && text[end..].starts_with(';')).then(|| &text[..=end])
}

/// What an entity stands for, also where all of it is in capitals: `&EACUTE;` is `É`.
fn meant_by(entity: &str) -> Option<String> {
    // in an attribute `&notit;` is no `&not` with something behind it
    let known = |entity: &str| {
        let meant = htmlize::unescape_attribute(entity);
        (meant != entity).then(|| meant.into_owned())
    };
    let in_capitals = || {
        let is = entity.bytes().all(|byte| !byte.is_ascii_lowercase()) && htmlize::unescape(entity) == entity;
        is.then(|| known(&entity.to_ascii_lowercase())).flatten().map(|meant| meant.to_uppercase())
    };
    known(entity).or_else(in_capitals)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected texts are ftfy 6.3.1's.
    #[test]
    fn quotes_and_entities_are_mended_as_ftfy_does() {
        for (text, expected) in [
            ("“smart” ‘quotes’ — em–dash… ellipsis", "\"smart\" 'quotes' — em–dash… ellipsis"),
            ("&amp; &lt;b&gt; &quot;x&quot; &#39;", "& <b> \"x\" '"),
            ("&amp;amp;", "&"),
            ("&copy; &eacute; &EACUTE; &nbsp;x", "© é É \u{a0}x"),
            ("a < b &amp; c", "a < b &amp; c"),
            ("&#x27;hi&#x27;", "'hi'"),
            ("Tom&amp;Jerry &bogus; &amp no", "Tom&Jerry &bogus; &amp no"),
            ("‚low‛ „low‟ ʼx", "'low' \"low\" 'x"),
            ("&ldquo;x&rdquo;", "\"x\""),
            ("&#128; &#8217;", "€ '"),
            ("´x´ `x` ′x″ «x»", "´x´ `x` ′x″ «x»"),
            ("&NBSP; &hellip;&HELLIP;", "\u{a0} ……"),
            ("BUNDESSTRA&SZLIG;E &notit; &LTDOT;", "BUNDESSTRASSE &notit; &LTDOT;"),
            ("rock & roll; AT&T", "rock & roll; AT&T"),
            ("&amp;lt;b&amp;gt; &amp;quot;", "<b> \""),
            ("&lt;&amp;amp;&gt;", "<&>"),
            ("a\n&amp;\n<b> &amp;", "a\n&\n<b> &amp;"),
            ("&", "&"),
            ("", ""),
        ] {
            assert_eq!(mended(text), expected, "{text}");
        }
    }
}
