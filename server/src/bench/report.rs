//! What was measured, summed up: a table for people and the same as JSON for programs.

use std::fmt::{self, Display, Formatter, Write};

use rill_kernels::limits::Limits;
use rill_models::WeightTraffic;
use serde::Serialize;

use super::client::EngineCounts;
use super::load::{Outcome, Work};

/// Median of several rounds, with the least and the most.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

/// Everything one run found out.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    pub rill_version: &'static str,
    pub date: String,
    pub processor: String,
    pub cores: usize,
    pub rounds: usize,
    pub neighbour: Option<String>,
    pub machine: Option<MachineLimits>,
    pub weights: Option<Weights>,
    pub start: Option<Start>,
    pub lines: Vec<Line>,
    /// First error of each server that had any.
    pub errors: Vec<String>,
}

/// Measured before each round, on as many threads as the server has.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MachineLimits {
    pub threads: usize,
    pub read_gb_s: Spread,
    pub int8_gmac_s: Spread,
}

/// What a token costs (`rill_models::WeightTraffic`).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Weights {
    pub file_mb: f64,
    pub token_mb: f64,
    pub token_mmac: f64,
    pub prompt_token_mmac: f64,
}

/// Of the server that was started for the occasion.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Start {
    pub ready_s: f64,
    pub first_token_s: f64,
    /// Physical memory when ready, and after all rounds.
    pub resident_ready_mb: Option<f64>,
    pub resident_after_mb: Option<f64>,
    /// When ready, without the weights; next to nothing of the KV cache has been touched by then.
    pub above_weights_mb: Option<f64>,
}

/// One work on one server, quiet or not.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    pub work: String,
    pub server: String,
    pub beside_neighbour: bool,
    pub streams: usize,
    pub prompt_words: usize,
    pub max_tokens: usize,
    /// Of prompt tokens for prefill, of generated ones otherwise.
    pub tokens_per_s: Spread,
    pub rates: Vec<f64>,
    pub first_token_ms: [f64; 2],
    pub between_tokens_ms: [f64; 3],
    pub failed_requests: usize,
    /// The first server's rate ÷ this one's, round by round.
    pub ratio: Option<Spread>,
    /// This rate ÷ the same server's without the neighbour, round by round.
    pub share_of_quiet: Option<Spread>,
    /// This rate ÷ that of the same streams without a grammar, round by round.
    pub share_of_free: Option<Spread>,
    /// Of answers that must match a grammar, where the server tells: share of the steps' time that went into it, and
    /// microseconds of that a token.
    pub grammar_share: Option<f64>,
    pub grammar_us: Option<f64>,
    /// Of the memory bandwidth for one stream, of the int8 rate for the rest.
    pub share_of_limit: Option<f64>,
    /// Multiply-accumulates for each byte of weights read, and billions of them a second.
    pub intensity: Option<f64>,
    pub gmac_s: Option<f64>,
}

/// The rounds of one line.
pub struct Measured<'a> {
    pub work: &'a Work,
    pub server: &'a str,
    pub beside_neighbour: bool,
    pub outcomes: &'a [Outcome],
}

impl Spread {
    /// `None` of nothing.
    pub fn of(values: &[f64]) -> Option<Spread> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
        Some(Spread { median, least, most })
    }

    fn of_ratios(over: &[f64], under: &[f64]) -> Option<Spread> {
        Spread::of(&over.iter().zip(under).filter(|(_, b)| **b > 0.0).map(|(a, b)| a / b).collect::<Vec<_>>())
    }
}

impl MachineLimits {
    pub fn of(threads: usize, rounds: &[Limits]) -> Option<MachineLimits> {
        let spread = |of: fn(&Limits) -> f64| Spread::of(&rounds.iter().map(|r| of(r) / 1e9).collect::<Vec<_>>());
        Some(MachineLimits {
            threads,
            read_gb_s: spread(|limits| limits.read_bytes_per_s)?,
            int8_gmac_s: spread(|limits| limits.int8_macs_per_s)?,
        })
    }
}

impl From<WeightTraffic> for Weights {
    fn from(traffic: WeightTraffic) -> Weights {
        Weights {
            file_mb: traffic.file_bytes / 1e6,
            token_mb: (traffic.layers.bytes + traffic.head.bytes) / 1e6,
            token_mmac: (traffic.layers.macs + traffic.head.macs) / 1e6,
            prompt_token_mmac: traffic.layers.macs / 1e6,
        }
    }
}

/// The value below which `share` of the values lie; they are sorted.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    sorted
        .get(((share * sorted.len() as f64) as usize).min(sorted.len().saturating_sub(1)))
        .copied()
        .unwrap_or(0.0)
}

impl Line {
    /// `None` if no request of any round succeeded. Shares of limits are for whom `weights` and limits are known.
    pub fn new(measured: &Measured, limits: Option<(MachineLimits, Weights)>) -> Option<Line> {
        let Measured { work, server, beside_neighbour, outcomes } = *measured;
        let rates: Vec<f64> = outcomes.iter().map(|outcome| outcome.rate(work)).collect();
        let samples = || outcomes.iter().flat_map(|outcome| &outcome.samples);
        let mut first: Vec<f64> = samples().map(|sample| sample.first.as_secs_f64() * 1e3).collect();
        let mut gaps: Vec<f64> = samples().flat_map(|s| &s.gaps).map(|gap| gap.as_secs_f64() * 1e3).collect();
        if first.is_empty() {
            return None;
        }
        first.sort_by(f64::total_cmp);
        gaps.sort_by(f64::total_cmp);
        let tokens_per_s = Spread::of(&rates)?;

        // Every prompt token and every generated one but the last of each request runs through the layers; every
        // generated one takes the head.
        let requests = samples().count() as f64;
        let prompt: f64 = outcomes.iter().map(|outcome| outcome.prompt_tokens() as f64).sum();
        let generated: f64 = outcomes.iter().map(|outcome| outcome.completion_tokens() as f64).sum();
        let seconds: f64 = outcomes.iter().map(|outcome| outcome.time.as_secs_f64()).sum();
        let counted = |of: fn(&EngineCounts) -> f64| -> Option<f64> {
            outcomes.iter().map(|outcome| outcome.engine.as_ref().map(of)).sum()
        };
        let steps = counted(|engine| engine.steps);
        let grammar = |over: fn(&EngineCounts) -> f64| {
            let share = counted(|engine| engine.grammar_s)? / counted(over)?;
            (work.structured && share.is_finite()).then_some(share)
        };
        let mmac = limits.map(|(_, weights)| {
            weights.prompt_token_mmac * (prompt + generated - requests)
                + (weights.token_mmac - weights.prompt_token_mmac) * generated
        });
        let gmac_s = mmac.map(|mmac| mmac / 1e3 / seconds);
        let intensity = match (limits, mmac, steps) {
            (Some((_, weights)), Some(mmac), Some(steps)) if steps > 0.0 => {
                Some(mmac / (steps * weights.token_mb))
            }
            _ => None,
        };
        let share_of_limit = limits.and_then(|(machine, weights)| {
            if work.streams == 1 {
                Some(tokens_per_s.median * weights.token_mb / 1e3 / machine.read_gb_s.median)
            } else {
                gmac_s.map(|rate| rate / machine.int8_gmac_s.median)
            }
        });
        Some(Line {
            work: work.name(),
            server: server.to_owned(),
            beside_neighbour,
            streams: work.streams,
            prompt_words: work.prompt_words,
            max_tokens: work.max_tokens,
            tokens_per_s,
            rates,
            first_token_ms: [0.5, 0.95].map(|share| percentile(&first, share)),
            between_tokens_ms: [0.5, 0.95, 0.99].map(|share| percentile(&gaps, share)),
            failed_requests: outcomes.iter().map(|outcome| outcome.errors.len()).sum(),
            ratio: None,
            share_of_quiet: None,
            share_of_free: None,
            grammar_share: grammar(|engine| engine.step_s),
            grammar_us: grammar(|engine| engine.grammar_tokens).map(|seconds| seconds * 1e6),
            share_of_limit,
            intensity,
            gmac_s,
        })
    }
}

/// Fills in what compares a line with another: the first server's, and its own without the neighbour.
pub fn compare(lines: &mut [Line], first_server: &str) {
    let all = lines.to_vec();
    let find = |work: &str, server: &str, beside: bool| {
        all.iter().find(|line| line.work == work && line.server == server && line.beside_neighbour == beside)
    };
    for line in lines {
        if line.server != first_server {
            let first = find(&line.work, first_server, line.beside_neighbour);
            line.ratio = first.and_then(|first| Spread::of_ratios(&first.rates, &line.rates));
        }
        if let Some(free) = line.work.strip_suffix(" of JSON") {
            let free = find(free, &line.server, line.beside_neighbour);
            line.share_of_free = free.and_then(|free| Spread::of_ratios(&line.rates, &free.rates));
        }
        if line.beside_neighbour {
            let quiet = find(&line.work, &line.server, false);
            line.share_of_quiet = quiet.and_then(|quiet| Spread::of_ratios(&line.rates, &quiet.rates));
        }
    }
}

/// Thousands apart, and decimals where there is little before them.
fn number(value: f64) -> String {
    if value < 100.0 {
        return format!("{value:.1}");
    }
    let digits = format!("{value:.0}");
    let mut out = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, {} cores; rill {}; {}", self.processor, self.cores, self.rill_version, self.date)?;
        if let Some(machine) = &self.machine {
            writeln!(
                f,
                "limits on {} threads: {:.1} GB/s read ({:.1} – {:.1}), {:.0} GMAC/s int8 ({:.0} – {:.0})",
                machine.threads,
                machine.read_gb_s.median,
                machine.read_gb_s.least,
                machine.read_gb_s.most,
                machine.int8_gmac_s.median,
                machine.int8_gmac_s.least,
                machine.int8_gmac_s.most
            )?;
        }
        if let (Some(weights), Some(machine)) = (&self.weights, &self.machine) {
            writeln!(
                f,
                "weights: {:.1} MB and {:.1} MMAC a token, so at most {:.0} tokens/s alone and {:.0} in a batch; \
                 prompts {:.0}",
                weights.token_mb,
                weights.token_mmac,
                machine.read_gb_s.median * 1e3 / weights.token_mb,
                machine.int8_gmac_s.median * 1e3 / weights.token_mmac,
                machine.int8_gmac_s.median * 1e3 / weights.prompt_token_mmac
            )?;
        }
        if let Some(start) = &self.start {
            write!(
                f,
                "start: ready after {:.2} s, first token after {:.2} s",
                start.ready_s, start.first_token_s
            )?;
            if let (Some(ready), Some(after)) = (start.resident_ready_mb, start.resident_after_mb) {
                write!(f, "; resident {ready:.0} MB when ready, {after:.0} MB after all rounds")?;
            }
            if let Some(above) = start.above_weights_mb {
                write!(f, "; {above:.0} MB above the weights when ready")?;
            }
            writeln!(f)?;
        }
        writeln!(f, "\n{} rounds, median (least – most)\n", self.rounds)?;
        writeln!(
            f,
            "| work | server | tokens/s | first token ms, p50 p95 | between ms, p50 p95 p99 | of limit | |"
        )?;
        writeln!(f, "|---|---|---|---|---|---|---|")?;
        for line in &self.lines {
            let rate = &line.tokens_per_s;
            let mut notes = String::new();
            if let Some(ratio) = &line.ratio {
                write!(
                    notes,
                    "{} is {:.2}× ({:.2} – {:.2}) ",
                    self.first_server(),
                    ratio.median,
                    ratio.least,
                    ratio.most
                )?;
            }
            if let Some(share) = &line.share_of_quiet {
                write!(notes, "{:.2} of quiet ({:.2} – {:.2}) ", share.median, share.least, share.most)?;
            }
            if let Some(share) = &line.share_of_free {
                write!(notes, "{:.2} of text ({:.2} – {:.2}) ", share.median, share.least, share.most)?;
            }
            if let (Some(share), Some(us)) = (line.grammar_share, line.grammar_us) {
                write!(notes, "grammar {:.1} % of steps, {us:.0} µs a token ", share * 100.0)?;
            }
            if line.failed_requests > 0 {
                write!(notes, "{} requests failed", line.failed_requests)?;
            }
            let limit = match line.share_of_limit {
                Some(share) if line.streams == 1 => format!("{:.0} % of read", share * 100.0),
                Some(share) => format!("{:.0} % of int8", share * 100.0),
                None => String::new(),
            };
            let list = |values: &[f64]| values.iter().map(|v| format!("{v:.1}")).collect::<Vec<_>>().join(" ");
            writeln!(
                f,
                "| {}{} | {} | {} ({} – {}) | {} | {} | {} | {} |",
                line.work,
                if line.beside_neighbour { ", beside" } else { "" },
                line.server,
                number(rate.median),
                number(rate.least),
                number(rate.most),
                list(&line.first_token_ms),
                list(&line.between_tokens_ms),
                limit,
                notes.trim_end()
            )?;
        }
        for error in &self.errors {
            writeln!(f, "\nfailed: {error}")?;
        }
        Ok(())
    }
}

impl Report {
    fn first_server(&self) -> &str {
        self.lines.first().map_or("", |line| line.server.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::super::client::Sample;
    use super::*;
    use std::time::Duration;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Some(Spread { median: 2.0, least: 1.0, most: 3.0 }));
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert_eq!(number(1234567.4), "1,234,567");
        assert_eq!((number(999.6), number(45.23)), ("1,000".to_owned(), "45.2".to_owned()));
    }

    fn line(server: &str, beside_neighbour: bool, seconds: f64) -> Line {
        line_of(server, beside_neighbour, seconds, false)
    }

    fn line_of(server: &str, beside_neighbour: bool, seconds: f64, structured: bool) -> Line {
        let work =
            Work { streams: 1, requests: 1, prompt_words: 1, max_tokens: 11, is_prefill: false, structured };
        let sample = Sample {
            prompt_tokens: 10,
            completion_tokens: 11,
            first: Duration::from_millis(8),
            gaps: vec![Duration::from_millis(4); 10],
        };
        let time = Duration::from_secs_f64(seconds);
        let engine = EngineCounts { steps: 11.0, step_s: 0.1, grammar_tokens: 10.0, grammar_s: 0.002 };
        let outcomes = [Outcome { samples: vec![sample], errors: Vec::new(), time, engine: Some(engine) }];
        let one = |value| Spread { median: value, least: value, most: value };
        let machine = MachineLimits { threads: 2, read_gb_s: one(10.0), int8_gmac_s: one(100.0) };
        let weights = Weights { file_mb: 100.0, token_mb: 100.0, token_mmac: 130.0, prompt_token_mmac: 100.0 };
        Line::new(
            &Measured { work: &work, server, beside_neighbour, outcomes: &outcomes },
            Some((machine, weights)),
        )
        .unwrap()
    }

    #[test]
    fn shares_and_ratios() {
        let mut lines = [line("rill", false, 0.2), line("peer", false, 0.4), line("rill", true, 0.25)];
        compare(&mut lines, "rill");
        // 55 tokens/s of the 100 that 10 GB/s allow.
        assert!((lines[0].share_of_limit.unwrap() - 0.55).abs() < 1e-9);
        // 20 rows through the layers and 11 through the head.
        assert!((lines[0].gmac_s.unwrap() - (20.0 * 0.1 + 11.0 * 0.03) / 0.2).abs() < 1e-9);
        assert!((lines[0].intensity.unwrap() - 2330.0 / 1100.0).abs() < 1e-9);
        assert!((lines[1].ratio.unwrap().median - 2.0).abs() < 1e-9 && lines[0].ratio.is_none());
        assert!((lines[2].share_of_quiet.unwrap().median - 0.8).abs() < 1e-9);
        assert_eq!(lines[0].first_token_ms, [8.0, 8.0]);
    }

    #[test]
    fn what_grammars_take() {
        let mut lines = [line("rill", false, 0.2), line_of("rill", false, 0.25, true)];
        compare(&mut lines, "rill");
        assert!(lines[0].share_of_free.is_none() && lines[0].grammar_share.is_none());
        assert!((lines[1].share_of_free.unwrap().median - 0.8).abs() < 1e-9);
        let close = |found: Option<f64>, expected: f64| (found.unwrap() - expected).abs() < 1e-9;
        assert!(close(lines[1].grammar_share, 0.02) && close(lines[1].grammar_us, 200.0));
    }
}
