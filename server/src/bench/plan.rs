//! Flags → what is measured, checked once.

use super::load::Work;
use super::neighbour::Neighbour;
use crate::cli::bench::BenchFlags;
use crate::config::ConfigError;
use crate::flag_values::IsaChoice;

/// Words in one request, streams and rounds have an end.
const STREAMS_MAX: usize = 1024;
const WORDS_MAX: usize = 1 << 20;
const TOKENS_MAX: usize = 1 << 20;
const ROUNDS_MAX: usize = 1000;
const PEERS_MAX: usize = 16;
/// Streams and tokens of the prefill measurement.
const PREFILL_STREAMS: usize = 4;
const PREFILL_TOKENS: usize = 2;
/// One stream alone asks this often.
const REQUESTS_MIN: usize = 4;

/// A measurement laid out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub works: Vec<Work>,
    pub rounds: usize,
    /// Name and address.
    pub peers: Vec<(String, String)>,
    pub neighbour: Option<Neighbour>,
}

impl Plan {
    pub fn new(flags: &BenchFlags) -> Result<Plan, ConfigError> {
        let within = |flag: &'static str, value: usize, low: usize, high: usize| {
            if (low..=high).contains(&value) {
                Ok(value)
            } else {
                Err(ConfigError::new(flag, format!("must be between {low} and {high}, not {value}")))
            }
        };
        let prompt_words = within("prompt-words", flags.prompt_words, 1, WORDS_MAX)?;
        let max_tokens = within("max-tokens", flags.max_tokens, 1, TOKENS_MAX)?;
        let mut works = Vec::new();
        for &streams in &flags.streams {
            let streams = within("streams", streams, 1, STREAMS_MAX)?;
            let requests = (2 * streams).max(REQUESTS_MIN);
            let work = Work { streams, requests, prompt_words, max_tokens, is_prefill: false, structured: false };
            works.push(work.clone());
            if flags.structured {
                works.push(Work { structured: true, ..work });
            }
        }
        if within("prefill", flags.prefill, 0, WORDS_MAX)? > 0 {
            works.push(Work {
                streams: PREFILL_STREAMS,
                requests: 3 * PREFILL_STREAMS,
                prompt_words: flags.prefill,
                max_tokens: PREFILL_TOKENS,
                is_prefill: true,
                structured: false,
            });
        }
        within("peer", flags.peer.len(), 0, PEERS_MAX)?;
        let peers = flags.peer.iter().map(|peer| match peer.split_once('=') {
            Some((name, url)) if !name.trim().is_empty() => Ok((name.trim().to_owned(), url.to_owned())),
            _ => Err(ConfigError::new("peer", format!("must be name=http://host:port/v1, not {peer}"))),
        });
        let own_flags = [("threads", flags.threads.is_some()), ("isa", flags.isa != IsaChoice::Auto)];
        for (flag, given) in own_flags.into_iter().chain([("url", !flags.serve.is_empty())]) {
            if flags.url.is_some() && given {
                let reason = "flags for the server that is started make no sense with --url".to_owned();
                return Err(ConfigError::new(flag, reason));
            }
        }
        Ok(Plan {
            works,
            rounds: within("rounds", flags.rounds, 1, ROUNDS_MAX)?,
            peers: peers.collect::<Result<_, _>>()?,
            neighbour: flags.neighbour.as_deref().map(Neighbour::parse),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        bench: BenchFlags,
    }

    fn plan(arguments: &str) -> Result<Plan, ConfigError> {
        let arguments = ["rill"].into_iter().chain(arguments.split_whitespace());
        Plan::new(&Flags::try_parse_from(arguments).unwrap().bench)
    }

    #[test]
    fn the_default_measures_streams_and_prefill() {
        let plan = plan("").unwrap();
        let found: Vec<_> = plan.works.iter().map(|work| (work.name(), work.requests)).collect();
        let expected =
            [("1 stream", 4), ("8 streams", 16), ("16 streams", 32), ("32 streams", 64), ("prefill", 12)];
        assert_eq!(found, expected.map(|(name, requests)| (name.to_owned(), requests)));
    }

    #[test]
    fn each_number_of_streams_is_measured_with_grammars_too() {
        let plan = plan("--streams 1,16 --prefill 0 --structured").unwrap();
        let names: Vec<_> = plan.works.iter().map(Work::name).collect();
        assert_eq!(names, ["1 stream", "1 stream of JSON", "16 streams", "16 streams of JSON"]);
    }

    #[test]
    fn flags_are_checked() {
        for (arguments, message) in [
            ("--streams 0", "--streams: must be between 1 and 1024, not 0"),
            ("--rounds 0", "--rounds: must be between 1 and 1000, not 0"),
            ("--peer http://x/v1", "--peer: must be name=http://host:port/v1"),
            ("--url http://x/v1 --threads 2", "--threads: flags for the server"),
            ("--url http://x/v1 -- --block-size 32", "--url: flags for the server"),
        ] {
            let error = plan(arguments).unwrap_err().to_string();
            assert!(error.starts_with(message), "{arguments}: {error}");
        }
        let plan = plan("--peer llama=http://x:1/v1 --prefill 0 --neighbour spin").unwrap();
        assert_eq!(plan.peers, [("llama".to_owned(), "http://x:1/v1".to_owned())]);
        assert_eq!((plan.works.len(), plan.neighbour), (4, Some(Neighbour::Spin)));
    }
}
