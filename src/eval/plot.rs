//! Line and scatter plots as SVG, with labels.

use plotters::prelude::*;

/// Size of a picture, pixels.
const SIZE: (u32, u32) = (900, 560);
/// Colours of series, told apart by colour-blind readers (Okabe and Ito 2008).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(0, 0, 0),
    RGBColor(148, 103, 39),
];

/// A plot: axes with titles, and series of points.
#[derive(Clone, Debug, Default)]
pub struct Plot {
    /// Above the picture.
    pub title: String,
    /// Below the horizontal axis.
    pub x_title: String,
    /// Beside the vertical axis.
    pub y_title: String,
    /// Whether the vertical axis is logarithmic; values that are not positive are then left out.
    pub log_y: bool,
    /// Drawn in order.
    pub series: Vec<Series>,
}

/// Points with a name in the legend.
#[derive(Clone, Debug, Default)]
pub struct Series {
    /// In the legend; an empty one is not listed.
    pub name: String,
    /// `(x, y)`; points that are not finite are left out.
    pub points: Vec<(f64, f64)>,
    /// Text beside each point, as far as there are texts.
    pub labels: Vec<String>,
    /// How the points are drawn.
    pub style: Style,
}

/// How points are drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Style {
    #[default]
    Line,
    Dots,
    LineAndDots,
}

/// Why a plot cannot be drawn.
#[derive(Debug, thiserror::Error)]
#[error("the plot {title:?} cannot be drawn: {reason}")]
#[allow(missing_docs)]
pub struct PlotError {
    pub title: String,
    pub reason: String,
}

impl Plot {
    /// The picture as an SVG document.
    ///
    /// # Errors
    /// There is no finite point.
    pub fn svg(&self) -> Result<String, PlotError> {
        let mut svg = String::new();
        let error = |reason: String| PlotError { title: self.title.clone(), reason };
        let all: Vec<(f64, f64)> = self.series.iter().flat_map(|s| self.placed(s)).map(|p| p.0).collect();
        let x = bounds(all.iter().map(|p| p.0)).ok_or_else(|| error("it has no points".into()))?;
        let y = bounds(all.iter().map(|p| p.1)).ok_or_else(|| error("it has no points".into()))?;
        {
            let area = SVGBackend::with_string(&mut svg, SIZE).into_drawing_area();
            self.draw(&area, x, y).map_err(|e| error(e.to_string()))?;
        }
        Ok(svg)
    }

    /// The points that can be drawn, where they are on linear axes, with their labels.
    fn placed<'s>(&self, series: &'s Series) -> Vec<((f64, f64), &'s str)> {
        let label = |i: usize| series.labels.get(i).map_or("", String::as_str);
        let place = |(x, y): (f64, f64)| (x, if self.log_y { y.log10() } else { y });
        let points = series.points.iter().enumerate().map(|(i, &p)| (place(p), label(i)));
        points.filter(|((x, y), _)| x.is_finite() && y.is_finite()).collect()
    }

    fn draw<DB: DrawingBackend>(
        &self,
        area: &DrawingArea<DB, plotters::coord::Shift>,
        x: (f64, f64),
        y: (f64, f64),
    ) -> Result<(), DrawingAreaErrorKind<DB::ErrorType>> {
        area.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(area)
            .caption(&self.title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(45)
            .y_label_area_size(65)
            .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
        let log_y = self.log_y;
        let y_text = move |y: &f64| number(if log_y { 10f64.powf(*y) } else { *y });
        chart
            .configure_mesh()
            .x_desc(&self.x_title)
            .y_desc(&self.y_title)
            .x_label_formatter(&|x| number(*x))
            .y_label_formatter(&y_text)
            .light_line_style(WHITE)
            .draw()?;
        for (i, series) in self.series.iter().enumerate() {
            let colour = COLOURS[i % COLOURS.len()];
            let placed = self.placed(series);
            if series.style != Style::Dots {
                let line = LineSeries::new(placed.iter().map(|p| p.0), colour.stroke_width(2));
                chart.draw_series(line)?;
            }
            if series.style != Style::Line {
                chart.draw_series(placed.iter().map(|p| Circle::new(p.0, 4, colour.filled())))?;
            }
            let labelled = placed.iter().filter(|p| !p.1.is_empty());
            let texts = labelled.map(|&(at, text)| {
                EmptyElement::at(at) + Text::new(text.to_owned(), (6, -12), ("sans-serif", 12))
            });
            chart.draw_series(texts)?;
            if !series.name.is_empty() {
                // A series without points, for the legend alone.
                chart
                    .draw_series(std::iter::empty::<Circle<(f64, f64), i32>>())?
                    .label(series.name.clone())
                    .legend(move |(x, y)| Rectangle::new([(x, y - 4), (x + 12, y + 4)], colour.filled()));
            }
        }
        if self.series.iter().any(|s| !s.name.is_empty()) {
            chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK).draw()?;
        }
        area.present()
    }
}

/// A little more than the range of the values; `None` where there are none.
fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let room = if high > low { 0.05 * (high - low) } else { 0.5 };
    (low <= high).then_some((low - room, high + room))
}

/// With as many digits as tell ticks apart, and no more.
fn number(v: f64) -> String {
    let text = format!("{v:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot() -> Plot {
        let line = Series {
            name: "first & last".into(),
            points: vec![(0.0, 1.0), (1.0, 10.0), (2.0, f64::NAN)],
            labels: vec!["a <b>".into()],
            style: Style::LineAndDots,
        };
        let dots = Series { points: vec![(0.5, 0.0)], style: Style::Dots, ..Series::default() };
        Plot { title: "A title".into(), series: vec![line, dots], ..Plot::default() }
    }

    #[test]
    fn points_labels_and_names_are_drawn_and_escaped() {
        let svg = plot().svg().unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for part in ["A title", "first &amp; last", "a &lt;b&gt;"] {
            assert!(svg.contains(part), "{part}");
        }
        assert_eq!(svg.matches("<circle").count(), 3, "the point that is no number is left out");
        let log = Plot { log_y: true, ..plot() }.svg().unwrap();
        assert_eq!(log.matches("<circle").count(), 2, "0 has no logarithm");
    }

    #[test]
    fn a_plot_without_points_is_an_error() {
        assert!(Plot::default().svg().is_err());
        assert_eq!((number(0.25), number(-0.0), number(3.0)), ("0.25".into(), "0".into(), "3".into()));
    }
}
