//! What a request that leaves a sampling parameter out gets: what the model's makers suggest (generation_config.json),
//! or the API's own defaults.

use rill_models::GenerationDefaults;

/// Values of unset fields.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingDefaults {
    pub temperature: f64,
    /// In (0, 1].
    pub top_p: f64,
    /// 0 is off.
    pub top_k: i64,
    pub min_p: f64,
    pub repetition_penalty: f64,
    /// Of answers to chats; `None`: what the context leaves.
    pub max_tokens: Option<u32>,
    /// Tokens that are never generated, unless a request biases them itself.
    pub suppressed: Vec<u32>,
}

/// Whose sampling parameters count where a request has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum GenerationConfig {
    /// The model's.
    Auto,
    /// The API's: temperature 1, and everything else off.
    #[value(alias = "none")]
    Vllm,
}

impl SamplingDefaults {
    /// Those of the API.
    pub const OPENAI: SamplingDefaults = SamplingDefaults {
        temperature: 1.0,
        top_p: 1.0,
        top_k: 0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        max_tokens: None,
        suppressed: Vec::new(),
    };

    /// Those of a model with so many tokens; the reason where they make no sense or are more than rill does.
    pub fn of_model(model: &GenerationDefaults, vocab_size: usize) -> Result<SamplingDefaults, String> {
        if let Some(name) = model.not_honoured.first() {
            return Err(format!("{name} is not supported"));
        }
        let within = |name: &str, value: Option<f32>, default: f64, low: f64, high: f64| match value {
            None => Ok(default),
            Some(value) if (low..=high).contains(&f64::from(value)) => Ok(f64::from(value)),
            Some(value) => Err(format!("{name} must be between {low} and {high}, not {value}")),
        };
        if let Some(id) = model.suppress_tokens.iter().find(|&&id| id as usize >= vocab_size) {
            return Err(format!("suppress_tokens: {id} is not one of the {vocab_size} tokens"));
        }
        Ok(SamplingDefaults {
            temperature: within("temperature", model.temperature, 1.0, 0.0, 2.0)?,
            top_p: within("top_p", model.top_p, 1.0, 0.0, 1.0)?,
            top_k: i64::from(model.top_k.unwrap_or(0)),
            min_p: within("min_p", model.min_p, 0.0, 0.0, 1.0)?,
            repetition_penalty: within("repetition_penalty", model.repetition_penalty, 1.0, 0.01, 10.0)?,
            max_tokens: model.max_new_tokens.map(|tokens| tokens.try_into().unwrap_or(u32::MAX)),
            suppressed: model.suppress_tokens.clone(),
        })
    }

    /// What differs from the API's own, in words.
    pub fn words(&self) -> Option<String> {
        let base = &Self::OPENAI;
        let number = |name: &str, value: f64, usual: f64| {
            // As the file spells it.
            (value != usual).then(|| format!("{name} {}", value as f32))
        };
        let parts = [
            number("temperature", self.temperature, base.temperature),
            number("top_p", self.top_p, base.top_p),
            (self.top_k != 0).then(|| format!("top_k {}", self.top_k)),
            number("min_p", self.min_p, base.min_p),
            number("repetition_penalty", self.repetition_penalty, base.repetition_penalty),
            self.max_tokens.map(|tokens| format!("max_tokens {tokens}")),
            (!self.suppressed.is_empty()).then(|| format!("{} tokens suppressed", self.suppressed.len())),
        ];
        let words = parts.into_iter().flatten().collect::<Vec<_>>().join(", ");
        (!words.is_empty()).then_some(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_values_replace_the_apis() {
        let model = GenerationDefaults {
            temperature: Some(0.6),
            top_k: Some(20),
            max_new_tokens: Some(4096),
            suppress_tokens: vec![3, 5],
            ..GenerationDefaults::default()
        };
        let found = SamplingDefaults::of_model(&model, 10).unwrap();
        assert_eq!((found.temperature as f32, found.top_k, found.max_tokens), (0.6, 20, Some(4096)));
        assert_eq!((found.top_p, found.min_p, found.repetition_penalty), (1.0, 0.0, 1.0));
        assert_eq!(found.words().unwrap(), "temperature 0.6, top_k 20, max_tokens 4096, 2 tokens suppressed");
        assert_eq!(SamplingDefaults::of_model(&GenerationDefaults::default(), 10), Ok(SamplingDefaults::OPENAI));
        assert_eq!(SamplingDefaults::OPENAI.words(), None);
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let check = |model: GenerationDefaults, part: &str| {
            let error = SamplingDefaults::of_model(&model, 10).unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        let base = GenerationDefaults::default;
        check(
            GenerationDefaults { temperature: Some(3.0), ..base() },
            "temperature must be between 0 and 2, not 3",
        );
        check(GenerationDefaults { top_p: Some(-1.0), ..base() }, "top_p");
        check(GenerationDefaults { repetition_penalty: Some(0.0), ..base() }, "repetition_penalty");
        check(GenerationDefaults { suppress_tokens: vec![10], ..base() }, "suppress_tokens: 10");
        check(
            GenerationDefaults { not_honoured: vec!["forced_bos_token_id".to_owned()], ..base() },
            "forced_bos_token_id",
        );
    }
}
