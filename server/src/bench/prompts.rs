//! Prompts no cache has seen: random everyday words, the same ones for the same seed.

const WORDS: &str = "the of and to in is was for on with as by at from river stone market engine letter garden winter \
    teacher signal island copper morning history window silver travel number kitchen doctor mountain paper village \
    system music answer bridge summer forest water story animal street simple school city night science picture \
    family government problem question world house light power body health open field green heart";

/// `words` words drawn by `seed`.
pub fn prompt(seed: u64, words: usize) -> String {
    let vocabulary: Vec<&str> = WORDS.split(' ').filter(|word| !word.is_empty()).collect();
    let mut state = seed;
    let mut text = String::new();
    for _ in 0..words {
        if !text.is_empty() {
            text.push(' ');
        }
        text.push_str(vocabulary[(split_mix(&mut state) % vocabulary.len() as u64) as usize]);
    }
    text
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_prompt() {
        assert_eq!(prompt(7, 60), prompt(7, 60));
        assert_ne!(prompt(7, 60), prompt(8, 60));
        assert_eq!(prompt(7, 60).split_whitespace().count(), 60);
    }
}
