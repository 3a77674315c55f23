//! `rill bench`: rounds in which servers take turns, the machine's own limits measured between them, and a report.

pub mod client;
pub mod load;
pub mod neighbour;
pub mod own_server;
pub mod plan;
pub mod prompts;
pub mod report;
pub mod roofline;

use std::path::PathBuf;
use std::time::Duration;

use rill_kernels::limits::{self, Limits};
use rill_models::{Isa, ModelError, SourceOptions, WeightTraffic};

use crate::cli::bench::BenchFlags;
use crate::config::ConfigError;
use crate::fetch_progress::TerminalProgress;
use crate::machine::Machine;
use client::{Client, RequestError};
use load::{Outcome, Target, Work};
use own_server::OwnServer;
use plan::Plan;
use report::{Line, MachineLimits, Measured, Report, Start, compare};

/// For each of the machine's limits, each round.
const LIMITS_TIME: Duration = Duration::from_millis(400);

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Model(#[from] ModelError),
    #[error("cannot start the server to measure: {0}")]
    Server(std::io::Error),
    #[error("cannot start the neighbour: {0}")]
    Neighbour(std::io::Error),
    #[error("{server} answers no request: {error}")]
    Target { server: String, error: RequestError },
    #[error("no request of any round succeeded")]
    Nothing,
    #[error("{path}: {error}")]
    Write { path: PathBuf, error: std::io::Error },
    #[error("--plot: the server tells no number of engine steps, or its weights are unknown (see --model)")]
    NoPlot,
    #[error("interrupted")]
    Interrupted,
    #[error(transparent)]
    System(#[from] std::io::Error),
}

/// Measures, prints the table, and writes what was asked for.
pub fn bench(flags: BenchFlags) -> Result<(), BenchError> {
    let plan = Plan::new(&flags)?;
    let isa = flags.isa.instructions()?.unwrap_or_else(Isa::detect);
    // One thread, so that the cores are the server's.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let report = runtime.block_on(async {
        tokio::select! {
            report = measure(&flags, &plan, isa) => report,
            _ = tokio::signal::ctrl_c() => Err(BenchError::Interrupted),
        }
    })?;
    print!("{report}");
    if let Some(path) = &flags.json {
        let text = serde_json::to_string_pretty(&report).map_err(std::io::Error::from)?;
        write(path, &text)?;
    }
    if let Some(path) = &flags.plot {
        write(path, &roofline::svg(&report).ok_or(BenchError::NoPlot)?)?;
    }
    Ok(())
}

fn write(path: &PathBuf, text: &str) -> Result<(), BenchError> {
    std::fs::write(path, text).map_err(|error| BenchError::Write { path: path.clone(), error })
}

async fn measure(flags: &BenchFlags, plan: &Plan, isa: Isa) -> Result<Report, BenchError> {
    let machine = Machine::detect();
    let threads = flags.threads.unwrap_or(machine.cores);
    let own = flags.url.is_none();
    let model = flags.model.clone().or_else(|| own.then(|| rill_models::DEFAULT_MODEL.to_owned()));
    let traffic = match &model {
        Some(model) => {
            let files = rill_models::resolve(model, &SourceOptions::from_env(), &mut TerminalProgress::default())?;
            Some(WeightTraffic::of(&files)?)
        }
        None => None,
    };
    let server = match own {
        true => Some(OwnServer::start(&serve_flags(flags)).map_err(BenchError::Server)?),
        false => None,
    };
    let ready_s = server.as_ref().map(|server| server.age().as_secs_f64());
    let resident = server.as_ref().and_then(OwnServer::resident_bytes).map(|bytes| bytes as f64 / 1e6);
    let url = flags.url.clone().or_else(|| server.as_ref().map(|server| server.url.clone())).unwrap_or_default();

    let mut targets = Vec::new();
    let named = [("rill".to_owned(), url)].into_iter().chain(plan.peers.iter().cloned());
    let mut start = None;
    for (name, url) in named {
        let flag = if targets.is_empty() { "url" } else { "peer" };
        let client =
            Client::new(&url, flags.api_key.clone()).map_err(|error| ConfigError::new(flag, error.to_string()))?;
        let model = match &flags.request_model {
            Some(model) => model.clone(),
            None => client.model().await,
        };
        let target = Target { name, client, model };
        let first = target.client.complete(&target.model, "Once upon a time", 1, false).await;
        first.map_err(|error| BenchError::Target { server: target.name.clone(), error })?;
        if let (Some(server), Some(ready_s), None) = (&server, ready_s, &start) {
            start = Some(Start {
                ready_s,
                first_token_s: server.age().as_secs_f64(),
                resident_ready_mb: resident,
                resident_after_mb: None,
                above_weights_mb: resident.zip(traffic).map(|(mb, traffic)| mb - traffic.file_bytes / 1e6),
            });
        }
        targets.push(target);
    }

    let mut machine_rounds = Vec::new();
    let mut measured = Rounds::new(plan, &targets);
    for target in &targets {
        for work in &plan.works {
            let short = Work { requests: work.streams, max_tokens: work.max_tokens.min(8), ..work.clone() };
            load::run(&short, target, 0).await;
        }
    }
    for round in 0..plan.rounds {
        eprintln!("round {} of {}", round + 1, plan.rounds);
        if traffic.is_some() {
            machine_rounds.push(on_a_thread(move || limits::measure(isa, threads, LIMITS_TIME)).await?);
        }
        measured.run(plan, &targets, round).await?;
    }

    let weights = traffic.map(report::Weights::from);
    let machine_limits = MachineLimits::of(threads, &machine_rounds);
    let mut lines: Vec<Line> = measured
        .lines(plan, &targets)
        .filter_map(|line| Line::new(&line, machine_limits.zip(weights).filter(|_| line.server == "rill")))
        .collect();
    if lines.is_empty() {
        return Err(BenchError::Nothing);
    }
    compare(&mut lines, "rill");
    if let (Some(start), Some(server)) = (&mut start, &server) {
        start.resident_after_mb = server.resident_bytes().map(|bytes| bytes as f64 / 1e6);
    }
    Ok(Report {
        rill_version: env!("CARGO_PKG_VERSION"),
        date: chrono::DateTime::<chrono::Utc>::from(std::time::SystemTime::now())
            .format("%Y-%m-%d %H:%M UTC")
            .to_string(),
        processor: processor(),
        cores: machine.cores,
        rounds: plan.rounds,
        neighbour: flags.neighbour.clone(),
        machine: machine_limits,
        weights,
        start,
        errors: measured.first_errors(&targets),
        lines,
    })
}

fn serve_flags(flags: &BenchFlags) -> Vec<String> {
    let mut serve = Vec::new();
    let mut pass =
        |flag: &str, value: Option<String>| serve.extend(value.map(|value| format!("--{flag}={value}")));
    pass("model", flags.model.clone());
    pass("threads", flags.threads.map(|threads| threads.to_string()));
    pass("api-key", flags.api_key.clone());
    let isa = clap::ValueEnum::to_possible_value(&flags.isa);
    pass("isa", isa.map(|value| value.get_name().to_owned()));
    serve.extend(flags.serve.iter().cloned());
    serve
}

async fn on_a_thread(f: impl FnOnce() -> Limits + Send + 'static) -> Result<Limits, BenchError> {
    tokio::task::spawn_blocking(f).await.map_err(|error| BenchError::System(std::io::Error::other(error)))
}

/// Outcomes by work, server, and whether a neighbour was there.
struct Rounds {
    servers: usize,
    conditions: usize,
    outcomes: Vec<Vec<Outcome>>,
}

impl Rounds {
    fn new(plan: &Plan, targets: &[Target]) -> Rounds {
        let conditions = if plan.neighbour.is_some() { 2 } else { 1 };
        let outcomes = vec![Vec::new(); plan.works.len() * targets.len() * conditions];
        Rounds { servers: targets.len(), conditions, outcomes }
    }

    fn index(&self, work: usize, server: usize, condition: usize) -> usize {
        (work * self.servers + server) * self.conditions + condition
    }

    /// Every work on every server; who goes first changes from round to round.
    async fn run(&mut self, plan: &Plan, targets: &[Target], round: usize) -> Result<(), BenchError> {
        for (w, work) in plan.works.iter().enumerate() {
            for turn in 0..self.servers * self.conditions {
                let turn = if round.is_multiple_of(2) { turn } else { self.servers * self.conditions - 1 - turn };
                let (s, condition) = (turn / self.conditions, turn % self.conditions);
                let beside = match (&plan.neighbour, condition) {
                    (Some(neighbour), 1) => Some(neighbour.start().map_err(BenchError::Neighbour)?),
                    _ => None,
                };
                if beside.is_some() {
                    // For it to have come up to speed.
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                let index = self.index(w, s, condition);
                let seed = 1 + (round * self.outcomes.len() + index) as u64;
                let outcome = load::run(work, &targets[s], seed).await;
                drop(beside);
                self.outcomes[index].push(outcome);
            }
        }
        Ok(())
    }

    fn lines<'a>(&'a self, plan: &'a Plan, targets: &'a [Target]) -> impl Iterator<Item = Measured<'a>> {
        let (servers, conditions) = (self.servers, self.conditions);
        self.outcomes.iter().enumerate().map(move |(index, outcomes)| Measured {
            work: &plan.works[index / conditions / servers],
            server: &targets[index / conditions % servers].name,
            beside_neighbour: index % conditions == 1,
            outcomes,
        })
    }

    fn first_errors(&self, targets: &[Target]) -> Vec<String> {
        let mut found = Vec::new();
        for (s, target) in targets.iter().enumerate() {
            let of_server =
                self.outcomes.iter().enumerate().filter(|(index, _)| index / self.conditions % self.servers == s);
            let first = of_server.flat_map(|(_, rounds)| rounds).flat_map(|outcome| &outcome.errors).next();
            found.extend(first.map(|error| format!("{}: {error}", target.name)));
        }
        found
    }
}

/// The processor's name, where the system tells.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned())
}
