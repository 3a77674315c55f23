//! The roofline plot (Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
//! architectures", 2009) as SVG: how many products a second each work does, under what memory and arithmetic allow.

use std::fmt::Write;

use super::report::{MachineLimits, Report};

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 440.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 46.0;
const RIGHT: f64 = WIDTH - 30.0;
const BOTTOM: f64 = HEIGHT - 56.0;

/// A logarithmic axis onto pixels.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// Whole powers of two around all of `values`.
    fn around(values: impl Iterator<Item = f64> + Clone, from: f64, to: f64) -> Axis {
        let low = values.clone().fold(f64::INFINITY, f64::min).log2().floor() - 1.0;
        let high = values.fold(0.0, f64::max).log2().ceil() + 1.0;
        Axis { low, high, from, to }
    }

    fn at(&self, value: f64) -> f64 {
        self.from + (value.log2() - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let step = ((self.high - self.low) / 8.0).ceil().max(1.0) as usize;
        (self.low as i32..=self.high as i32).step_by(step).map(f64::from).map(f64::exp2)
    }
}

/// `None` where the machine's limits, or every work's intensity, are unknown.
pub fn svg(report: &Report) -> Option<String> {
    let machine = report.machine?;
    let points: Vec<(String, f64, f64)> = report
        .lines
        .iter()
        .filter(|line| !line.beside_neighbour)
        .filter_map(|line| Some((line.work.clone(), line.intensity?, line.gmac_s?)))
        .collect();
    if points.is_empty() {
        return None;
    }
    Some(draw(report, machine, &points))
}

fn draw(report: &Report, machine: MachineLimits, points: &[(String, f64, f64)]) -> String {
    let (bandwidth, peak) = (machine.read_gb_s.median, machine.int8_gmac_s.median);
    let ridge = peak / bandwidth;
    let x = Axis::around(points.iter().map(|point| point.1).chain([ridge]), LEFT, RIGHT);
    let y = Axis::around(points.iter().map(|point| point.2).chain([peak]), BOTTOM, TOP);
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut text = |x: f64, y: f64, anchor: &str, what: &str| {
        let what = what.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(out, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>");
    };
    let title = format!("{}, {} threads, {}", report.processor, machine.threads, report.date);
    text(LEFT, 24.0, "start", &title);
    text((LEFT + RIGHT) / 2.0, HEIGHT - 14.0, "middle", "multiply-accumulates for each byte of weights read");
    text(8.0, TOP - 8.0, "start", "GMAC/s");
    for tick in x.ticks() {
        text(x.at(tick), BOTTOM + 18.0, "middle", &tick.to_string());
    }
    for tick in y.ticks() {
        text(LEFT - 8.0, y.at(tick) + 4.0, "end", &tick.to_string());
    }
    text(x.at(ridge) + 6.0, y.at(peak) - 8.0, "start", &format!("{peak:.0} GMAC/s int8"));
    let start = 2f64.powf(x.low).max(2f64.powf(y.low) / bandwidth);
    text(x.at(start) + 12.0, y.at(start * bandwidth) - 12.0, "start", &format!("{bandwidth:.1} GB/s read"));
    for (name, intensity, rate) in points {
        let roof = peak.min(intensity * bandwidth);
        let label = format!("{name}: {rate:.0}, {:.0} %", rate / roof * 100.0);
        text(x.at(*intensity) + 8.0, y.at(*rate) + 14.0, "start", &label);
    }
    let _ = writeln!(
        out,
        "<path d=\"M{LEFT} {TOP}V{BOTTOM}H{RIGHT}\" fill=\"none\" stroke=\"#888\"/>\n<path d=\"M{:.1} {:.1}L{:.1} {:.1}H{RIGHT}\" \
         fill=\"none\" stroke=\"#15c\" stroke-width=\"2\"/>",
        x.at(start),
        y.at(start * bandwidth),
        x.at(ridge),
        y.at(peak)
    );
    for (_, intensity, rate) in points {
        let _ = writeln!(
            out,
            "<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4\" fill=\"#c31\"/>",
            x.at(*intensity),
            y.at(*rate)
        );
    }
    out.push_str("</svg>\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_hold_what_is_drawn() {
        let axis = Axis::around([3.0, 100.0].into_iter(), 0.0, 80.0);
        assert_eq!((axis.low, axis.high), (0.0, 8.0));
        assert_eq!((axis.at(1.0), axis.at(256.0)), (0.0, 80.0));
        assert_eq!(axis.ticks().count(), 9);
    }
}
