//! The picture: what requests cost beside each peer, and how long they wait beside the better one.

use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use crate::Error;
use crate::requests::Case;
use crate::results::{Results, Spread, WAIT_BAR, bars};
use crate::servers::Kind;

const NGINX: RGBColor = RGBColor(30, 100, 200);
const HAPROXY: RGBColor = RGBColor(230, 140, 0);
const PINGORA: RGBColor = RGBColor(140, 140, 140);
const BAR: RGBColor = RGBColor(215, 30, 30);

/// The highest part in a panel, if nothing is higher.
const TOP: f64 = 1.6;

/// How far from each other marks of one case are.
const APART: f64 = 0.22;

/// Marks of one colour, one for each case.
struct Series {
    name: &'static str,
    color: RGBColor,
    /// Where in its case: 0 is the middle.
    place: f64,
    /// And what it may be at most.
    marks: Vec<(Spread, Option<f64>)>,
}

/// Draws both panels, one below the other.
pub fn draw(results: &Results, out: &Path) -> Result<(), Error> {
    let beside = |name, color, place, peer: Kind| {
        let bar = |case: Case| bars(case.way).into_iter().find(|(kind, _)| *kind == peer).map(|(_, bar)| bar);
        let mark = |case: Case| (results.cost_beside(Kind::Gateway, peer, case), bar(case));
        Series { name, color, place, marks: Case::ALL.into_iter().map(mark).collect() }
    };
    let costs = [
        beside("beside NGINX", NGINX, -APART, Kind::Nginx),
        beside("beside HAProxy", HAPROXY, 0.0, Kind::HaProxy),
        beside("beside bare Pingora", PINGORA, APART, Kind::Pingora),
    ];
    let marks = Case::ALL.map(|case| (results.wait_beside_better(case).1, Some(WAIT_BAR)));
    let waits = [Series { name: "beside the better peer", color: NGINX, place: 0.0, marks: marks.to_vec() }];

    let root = SVGBackend::new(out, (1000, 760)).into_drawing_area();
    root.fill(&WHITE)?;
    let below = root.titled("moh-gateway with ten limits, beside others in the same run", ("sans-serif", 28))?;
    let (upper, lower) = below.split_vertically(370);
    draw_panel(&upper, "CPU for a request: the gateway's as a part of theirs", &costs)?;
    draw_panel(&lower, "p99 at half load: the gateway's as a part of the better peer's", &waits)?;
    Ok(root.present()?)
}

fn draw_panel(panel: &DrawingArea<SVGBackend<'_>, Shift>, title: &str, all: &[Series]) -> Result<(), Error> {
    let highest = all.iter().flat_map(|series| &series.marks).map(|(spread, _)| spread.most).fold(0.0, f64::max);
    let mut chart = ChartBuilder::on(panel)
        .caption(title, ("sans-serif", 20))
        .margin(8)
        .margin_right(24)
        .x_label_area_size(12)
        .y_label_area_size(60)
        .build_cartesian_2d(0.0..Case::ALL.len() as f64, 0.0..TOP.max(highest * 1.1))?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(BLACK.mix(0.1))
        .y_labels(8)
        .x_label_formatter(&|_| String::new())
        .y_label_formatter(&|part| format!("{part:.1}"))
        .y_desc("1 is as much as theirs")
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 16))
        .draw()?;
    let style = ("sans-serif", 15).into_font().color(&BLACK).pos(Pos::new(HPos::Center, VPos::Bottom));
    let middle = |n: usize| n as f64 + 0.5;
    let names = Case::ALL.into_iter().enumerate();
    chart.draw_series(names.map(|(n, case)| Text::new(case.to_string(), (middle(n), 0.03), style.clone())))?;

    let (width, mut bars) = (APART * 0.4, vec![]);
    for Series { name, color, place, marks } in all {
        let color = *color;
        let at = marks.iter().enumerate().map(|(n, (spread, bar))| (middle(n) + place, *spread, *bar));
        let ends = at.clone().map(|(x, spread, _)| [(x, spread.least), (x, spread.most)]);
        chart.draw_series(ends.map(|ends| PathElement::new(ends, color.stroke_width(2))))?;
        chart
            .draw_series(at.clone().map(|(x, spread, _)| Circle::new((x, spread.median), 5, color.filled())))?
            .label(*name)
            .legend(move |(x, y)| Circle::new((x + 15, y), 5, color.filled()));
        bars.extend(at.filter_map(|(x, _, bar)| Some([(x - width, bar?), (x + width, bar?)])));
    }
    chart
        .draw_series(bars.into_iter().map(|ends| PathElement::new(ends, BAR.stroke_width(3))))?
        .label("the bar")
        .legend(|(x, y)| PathElement::new([(x + 5, y), (x + 25, y)], BAR.stroke_width(3)));
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .margin(6)
        .legend_area_size(32)
        .label_font(("sans-serif", 15))
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    Ok(())
}
