//! GPT-2's alphabet, in which every byte is spelled as one printable character.

/// The character `byte` is spelled as: itself where printable, else the next unused one from U+0100 on.
pub(super) fn char_of(byte: u8) -> char {
    let shifted = |offset: u32| char::from_u32(0x100 + offset).expect("a letter below U+0144");
    match byte {
        b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
        0..=0x20 => shifted(byte.into()),
        0x7f..=0xa0 => shifted(u32::from(byte) - 0x7f + 33),
        0xad => shifted(67),
    }
}

fn byte_of(c: char) -> Option<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The bytes `token` spells, or `None` if a character of it is not of the alphabet.
pub(super) fn bytes_of(token: &str) -> Option<Vec<u8>> {
    token.chars().map(byte_of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_a_character_of_its_own() {
        let chars: std::collections::HashSet<char> = (0..=255).map(char_of).collect();
        assert_eq!(chars.len(), 256);
        for byte in 0..=255 {
            assert_eq!(byte_of(char_of(byte)), Some(byte));
        }
    }

    #[test]
    fn known_spellings() {
        assert_eq!([b' ', b'\n', b'\t', 0x7f, 0xad].map(char_of), ['Ġ', 'Ċ', 'ĉ', 'ġ', 'Ń']);
        assert_eq!(bytes_of("Ġhello"), Some(b" hello".to_vec()));
        assert_eq!(bytes_of("日"), None);
    }
}
