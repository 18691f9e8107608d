//! The report as one page: no script, no font and no style from elsewhere, charts drawn as SVG.

use std::fmt::Write as _;

use super::figures::Better;
use super::measure::Measured;
use super::plan::Variant;
use super::report::Report;

const COLOURS: [&str; 5] = ["#1f6feb", "#d1242f", "#8250df", "#1a7f37", "#9a6700"];
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 260.0;
const LEFT: f64 = 70.0;
const BOTTOM: f64 = 36.0;
const TOP: f64 = 14.0;

const STYLE: &str = "\
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1f2328;background:#fff}\
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}\
table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
td,th{padding:.25rem .75rem;border-bottom:1px solid #d0d7de;text-align:right;font-weight:400}\
th{color:#57606a}td:first-child,th:first-child{text-align:left}\
.good{color:#1a7f37}.bad{color:#d1242f}.note{color:#57606a}\
svg{max-width:100%;height:auto;font:12px system-ui,sans-serif}";

/// The whole page.
pub(super) fn page(report: &Report) -> String {
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>postroad bench {name}</title><style>{STYLE}</style></head><body>\n<h1>postroad bench {name}</h1>\n\
         <p>{what}</p>\n<p class=\"note\">{environment}</p>\n<p class=\"{class}\">{verdict}</p>\n",
        name = report.scenario.name(),
        what = escape(&report.what()),
        environment = escape(&report.environment()),
        class = if report.is_clean() { "good" } else { "bad" },
        verdict = escape(&report.verdict()),
    );
    table(&mut page, report);
    let rates = report.rates();
    if rates.len() > 1 {
        page.push_str("<h2>Messages per second</h2>\n<p class=\"note\">Median; the thin line is from the least to the most of the rounds.</p>\n");
        bars(&mut page, &rates);
    }
    over_time(&mut page, report);
    curve(&mut page, report);
    page.push_str("</body></html>\n");
    page
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn table(page: &mut String, report: &Report) {
    page.push_str("<table><tr><th></th>");
    for (variant, _) in &report.results {
        let _ = write!(page, "<th>{}</th>", escape(&variant.name));
        if variant.is_baseline {
            page.push_str("<th>ratio</th>");
        }
    }
    page.push_str("</tr>\n");
    for row in report.rows() {
        let _ = write!(page, "<tr><td>{}</td>", escape(row.label));
        for (place, (variant, _)) in report.results.iter().enumerate() {
            let _ = write!(page, "<td>{}</td>", row.value(place));
            if variant.is_baseline {
                let class = row.ratios[place].map_or("", |ratio| {
                    match (ratio >= 1.0) == (row.better == Better::More) {
                        true => "good",
                        false => "bad",
                    }
                });
                let _ = write!(page, "<td class=\"{class}\">{}</td>", row.ratio(place));
            }
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</table>\n");
}

fn bars(page: &mut String, rates: &[(&str, f64, f64, f64)]) {
    let most = rates.iter().map(|rate| rate.3).fold(1.0, f64::max);
    let height = 34.0 * rates.len() as f64 + 8.0;
    let scale = (WIDTH - 260.0) / most;
    let _ = write!(
        page,
        "<svg viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" role=\"img\">"
    );
    for (place, (name, median, least, most)) in rates.iter().enumerate() {
        let y = 34.0 * place as f64 + 6.0;
        let _ = write!(
            page,
            "<text x=\"150\" y=\"{ty}\" text-anchor=\"end\">{name}</text>\
             <rect x=\"160\" y=\"{y}\" width=\"{width:.1}\" height=\"22\" fill=\"{colour}\"/>\
             <line x1=\"{x1:.1}\" x2=\"{x2:.1}\" y1=\"{ly}\" y2=\"{ly}\" stroke=\"#1f2328\"/>\
             <text x=\"{tx:.1}\" y=\"{ty}\">{value}</text>",
            ty = y + 15.0,
            ly = y + 11.0,
            name = escape(name),
            width = median * scale,
            colour = COLOURS[place % COLOURS.len()],
            x1 = 160.0 + least * scale,
            x2 = 160.0 + most * scale,
            tx = 168.0 + most * scale,
            value = super::live::grouped(*median),
        );
    }
    page.push_str("</svg>\n");
}

/// A line of a chart.
struct Line {
    name: String,
    points: Vec<(f64, f64)>,
}

/// A chart of lines; `ticks` are the places on the x axis that have a label.
fn chart(page: &mut String, lines: &[Line], ticks: &[(f64, String)], unit: &str) {
    let points = || lines.iter().flat_map(|line| &line.points);
    let most = points().map(|point| point.1).fold(0.0, f64::max);
    let last = points().map(|point| point.0).fold(0.0, f64::max);
    if points().next().is_none() || most <= 0.0 {
        return;
    }
    let top = round_up(most);
    let x = |value: f64| LEFT + value / last.max(1e-9) * (WIDTH - LEFT - 20.0);
    let y = |value: f64| TOP + (1.0 - value / top) * (HEIGHT - TOP - BOTTOM);
    let _ = write!(
        page,
        "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" role=\"img\">"
    );
    for step in 0..=4 {
        let value = top * f64::from(step) / 4.0;
        let label = match top < 10.0 {
            true => format!("{value:.2}"),
            false => super::live::grouped(value),
        };
        let _ = write!(
            page,
            "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#d0d7de\"/>\
             <text x=\"{tx}\" y=\"{ty:.1}\" text-anchor=\"end\">{label}</text>",
            right = WIDTH - 20.0,
            at = y(value),
            tx = LEFT - 6.0,
            ty = y(value) + 4.0,
        );
    }
    for (at, label) in ticks {
        let _ = write!(
            page,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            x(*at),
            HEIGHT - BOTTOM + 16.0,
            escape(label)
        );
    }
    for (place, line) in lines.iter().enumerate() {
        let points: Vec<String> = (line.points.iter())
            .map(|(a, b)| format!("{:.1},{:.1}", x(*a), y(*b)))
            .collect();
        let _ = write!(
            page,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\"/>",
            points.join(" "),
            COLOURS[place % COLOURS.len()]
        );
    }
    let _ = write!(
        page,
        "<text x=\"4\" y=\"{}\" class=\"note\">{}</text></svg>\n<p>",
        HEIGHT - 4.0,
        escape(unit)
    );
    for (place, line) in lines.iter().enumerate() {
        let _ = write!(
            page,
            "<span style=\"color:{}\">&#9644; {}</span> ",
            COLOURS[place % COLOURS.len()],
            escape(&line.name)
        );
    }
    page.push_str("</p>\n");
}

/// The next of 1, 2, 2.5 and 5 times a power of ten.
fn round_up(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 2.5, 5.0, 10.0];
    let step = steps.iter().find(|step| **step * power >= value);
    step.unwrap_or(&10.0) * power
}

fn over_time(page: &mut String, report: &Report) {
    let lines = |read: fn(&super::measure::Window) -> Option<f64>| -> Vec<Line> {
        (report.results.iter())
            .filter_map(|(variant, rounds)| {
                // Of several rounds the last: one line per variant can be read.
                let round = rounds.last()?;
                let points = (round.windows.iter())
                    .filter_map(|window| Some((window.second as f64, read(window)?)));
                let line = Line {
                    name: variant.name.clone(),
                    points: points.collect(),
                };
                (line.points.len() > 1).then_some(line)
            })
            .collect()
    };
    let rates = lines(|window| Some(window.per_second));
    if rates.is_empty() {
        return;
    }
    let last = rates
        .iter()
        .flat_map(|line| &line.points)
        .map(|point| point.0)
        .fold(0.0, f64::max);
    let ticks: Vec<(f64, String)> = (0..=5)
        .map(|step| last * f64::from(step) / 5.0)
        .map(|second| (second, format!("{second:.0} s")))
        .collect();
    page.push_str("<h2>Over time</h2>\n");
    chart(page, &rates, &ticks, "messages per second");
    let p99s = lines(|window| window.p99_ms);
    chart(page, &p99s, &ticks, "commit to receipt, p99 in ms");
}

fn curve(page: &mut String, report: &Report) {
    let line = |(variant, rounds): &(Variant, Vec<Measured>)| {
        let round = rounds.last().filter(|round| round.latency.is_some())?;
        // Each nine as wide as the one before it.
        let place = |quantile: f64| -(1.0 - quantile.min(0.99995)).log10();
        let points = round.latency_curve.iter();
        Some(Line {
            name: variant.name.clone(),
            points: points.map(|(at, ms)| (place(*at), *ms)).collect(),
        })
    };
    let lines: Vec<Line> = report.results.iter().filter_map(line).collect();
    if lines.is_empty() {
        return;
    }
    let ticks = [
        (0.301, "50 %"),
        (1.0, "90 %"),
        (2.0, "99 %"),
        (3.0, "99.9 %"),
        (4.0, "99.99 %"),
    ];
    let ticks = ticks.map(|(at, label)| (at, label.to_owned()));
    page.push_str("<h2>Commit to receipt, by share of messages</h2>\n");
    chart(page, &lines, &ticks, "milliseconds");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_outside_is_escaped() {
        assert_eq!(escape("<a href=\"&\">"), "&lt;a href=&quot;&amp;&quot;&gt;");
    }

    #[test]
    fn an_axis_ends_on_a_round_number() {
        for (value, top) in [
            (0.7, 1.0),
            (1.0, 1.0),
            (1.2, 2.0),
            (230.0, 250.0),
            (7_001.0, 10_000.0),
        ] {
            assert!((round_up(value) - top).abs() < top * 1e-9, "{value}");
        }
    }
}
