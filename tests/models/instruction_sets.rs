//! Every instruction set this processor runs gives the same logits, bit for bit, and so the same tokens: `--isa` is a
//! choice of speed alone.

use rill_models::Isa;
use rill_tests::default_model;
use rill_tests::reference::Reference;
use rill_tests::single_sequence::SingleSequence;

/// Tokens generated after each prompt; few, because plain Rust takes its time.
const GENERATED: usize = 6;
/// Of the fixture: text, and a chat.
const PROMPTS: [usize; 2] = [0, 12];

/// The tokens chosen after `prompt`, and the bits of every logit they were chosen from.
fn greedy(model: &mut SingleSequence, prompt: &[u32]) -> (Vec<u32>, Vec<u32>) {
    model.restart();
    let (mut tokens, mut bits) = (Vec::new(), Vec::new());
    let mut logits = model.step(prompt, false).expect("rill runs");
    loop {
        bits.extend(logits.iter().map(|x| x.to_bits()));
        let best = (0..logits.len()).max_by(|&a, &b| logits[a].total_cmp(&logits[b]).then(b.cmp(&a)));
        tokens.push(best.expect("a vocabulary") as u32);
        if tokens.len() == GENERATED {
            return (tokens, bits);
        }
        logits = model.step(&tokens[tokens.len() - 1..], false).expect("rill runs");
    }
}

#[test]
fn every_instruction_set_generates_the_same_tokens() {
    let reference = Reference::read();
    let mut expected = None;
    for isa in Isa::ALL.into_iter().rev() {
        if !isa.available() {
            println!("{}: not on this processor", isa.name());
            continue;
        }
        let loaded = default_model::load_with(Some(isa));
        assert!(loaded.description.contains(isa.name()), "{}", loaded.description);
        let mut model = SingleSequence::new(loaded.model, 16, 1024).expect("a small KV cache fits");
        let found = PROMPTS.map(|index| greedy(&mut model, &reference.continuations[index].prompt));
        let expected = expected.get_or_insert_with(|| found.clone());
        for (index, (found, expected)) in found.iter().zip(expected.iter()).enumerate() {
            assert_eq!(found.0, expected.0, "tokens of prompt {index} on {}", isa.name());
            let differing = found.1.iter().zip(&expected.1).filter(|(a, b)| a != b).count();
            assert_eq!(differing, 0, "logits of prompt {index} on {} that differ in some bit", isa.name());
        }
    }
}
