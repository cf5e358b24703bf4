//! The picture: a panel for each load.

use std::path::Path;

use plotters::chart::SeriesAnno;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::element::DashedPathElement;
use plotters::prelude::*;

use crate::load::Run;
use crate::{BURST, Error, RATE, WINDOW, bound};

const OFFERED: RGBColor = RGBColor(140, 140, 140);
const ADMITTED: RGBColor = RGBColor(30, 100, 200);
const BOUND: RGBColor = RGBColor(215, 30, 30);
const FIXED: RGBColor = RGBColor(230, 140, 0);

/// The highest count in a panel. A flood leaves it, and its line ends there.
const TOP: f64 = 420.0;

type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Draws the runs, one below the other.
pub fn draw(runs: &[Run], out: &Path) -> Result<(), Error> {
    let root = SVGBackend::new(out, (1000, 900)).into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!("What one limit admits: rate {RATE}/s, burst {BURST}");
    let below = root.titled(&title, ("sans-serif", 28))?;
    for (panel, run) in below.split_evenly((runs.len(), 1)).iter().zip(runs) {
        draw_run(panel, run)?;
    }
    Ok(root.present()?)
}

fn draw_run(panel: &DrawingArea<SVGBackend<'_>, Shift>, run: &Run) -> Result<(), Error> {
    let span = run.load.span;
    let mut chart = ChartBuilder::on(panel)
        .caption(format!("{}: {}", run.load.name, run.load.title), ("sans-serif", 20))
        .margin(8)
        .margin_right(24)
        .x_label_area_size(42)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..span, 0.0..TOP)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.1))
        .x_labels(11)
        .y_labels(5)
        .x_label_formatter(&|seconds| format!("{seconds:.1}"))
        .y_label_formatter(&|count| format!("{count:.0}"))
        .x_desc("seconds since the first request")
        .y_desc("requests")
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 16))
        .draw()?;

    let (offered, admitted) = (run.offered.len(), run.admitted.len());
    let leaves = if offered as f64 > TOP { ", beyond the picture" } else { "" };
    draw_line(&mut chart, steps(&run.offered, span), OFFERED.stroke_width(4), &format!("offered: {offered}{leaves}"))?;
    if let Some((edge, fixed)) = run.load.edge.zip(run.fixed_window()) {
        let edges = std::iter::successors(Some(edge), |edge| Some(edge + WINDOW)).take_while(|edge| *edge < span);
        for edge in edges {
            draw_dashes(&mut chart, [(edge, 0.0), (edge, TOP)], FIXED.stroke_width(1))?;
        }
        let label = format!("a fixed window, {BURST} in {WINDOW} s, would admit: {} (dashed: its edges)", fixed.len());
        draw_line(&mut chart, steps(&fixed, span), FIXED.stroke_width(2), &label)?;
    }
    draw_line(&mut chart, steps(&run.admitted, span), ADMITTED.stroke_width(4), &format!("admitted: {admitted}"))?;
    let (style, label) = (BOUND.stroke_width(2), format!("the bound: {BURST} + {RATE} · t"));
    draw_dashes(&mut chart, [(0.0, bound(0.0)), (span, bound(span))], style)?
        .label(label)
        .legend(move |(x, y)| DashedPathElement::new([(x, y), (x + 30, y)], 12, 6, style));

    // Where no line passes.
    let place = if run.load.edge.is_some() { SeriesLabelPosition::UpperLeft } else { SeriesLabelPosition::LowerRight };
    chart
        .configure_series_labels()
        .position(place)
        .margin(6)
        .legend_area_size(42)
        .label_font(("sans-serif", 15))
        .background_style(WHITE)
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}

/// A line, with its place in the legend.
fn draw_line(chart: &mut Chart<'_, '_>, points: Vec<(f64, f64)>, style: ShapeStyle, label: &str) -> Result<(), Error> {
    chart
        .draw_series(LineSeries::new(points, style))?
        .label(label)
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 30, y)], style));
    Ok(())
}

/// A straight line of dashes.
fn draw_dashes<'c, 'a, 'b>(
    chart: &'c mut Chart<'a, 'b>,
    ends: [(f64, f64); 2],
    style: ShapeStyle,
) -> Result<&'c mut SeriesAnno<'a, SVGBackend<'b>>, Error> {
    Ok(chart.draw_series(DashedLineSeries::new(ends, 12, 6, style))?)
}

/// How many there have been, over time: up to [`TOP`], else to the end of the panel. No finer than can be seen.
fn steps(times: &[f64], span: f64) -> Vec<(f64, f64)> {
    let mut points = vec![(0.0, 0.0)];
    let mut count = 0.0;
    for at in times.iter().copied().filter(|at| *at <= span) {
        points.extend([(at, count), (at, count + 1.0)]);
        count += 1.0;
    }
    points.push((span, count));
    points.retain(|(_, count)| *count <= TOP);
    points.dedup_by_key(|(at, count)| ((*at / span * 1000.0) as u32, *count as u32));
    points
}
