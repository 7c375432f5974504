//! Quality against bits: a point a cache, its interval, and the line of those that none is better than.

use plotters::prelude::*;

use super::draw::{Area, COLOURS, Drawn, INK, LEFT, MIDDLE, RIGHT, Refusal, line, write};

const SIZE: (u32, u32) = (520, 340);
/// Sides of the frame: left, top, right, bottom.
const FRAME: (i32, i32, i32, i32) = (64, 40, 500, 286);
/// Width of a letter and height of a line of labels.
const LETTER: (i32, i32) = (7, 15);

/// A cache in a plot.
#[derive(Debug, Clone)]
pub struct Point {
    /// What it is called.
    pub name: String,
    /// Bits an element.
    pub bits: f64,
    /// Quality.
    pub value: f64,
    /// Interval of `value`.
    pub range: Option<(f64, f64)>,
}

/// What a plot shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A divergence: on a logarithmic axis, the less the better.
    Divergence,
    /// A share: from 0 to 1, the more the better.
    Share,
}

/// An axis from `low` to `high`, in what its values are mapped to.
struct Axis {
    low: f64,
    high: f64,
    pixels: (i32, i32),
    map: fn(f64) -> f64,
    /// Values that are named.
    ticks: Vec<f64>,
}

impl Axis {
    fn at(&self, value: f64) -> i32 {
        // What lies below 0 has no logarithm.
        let share = ((self.map)(value.max(0.0)) - self.low) / (self.high - self.low);
        let (from, to) = (f64::from(self.pixels.0), f64::from(self.pixels.1));
        (from + share.clamp(0.0, 1.0) * (to - from)).round() as i32
    }

    fn new(map: fn(f64) -> f64, range: (f64, f64), pixels: (i32, i32), ticks: &[f64]) -> Self {
        let inside = |tick: &&f64| (range.0..=range.1).contains(*tick);
        let ticks = ticks.iter().filter(inside).copied().collect();
        Self { low: map(range.0), high: map(range.1), pixels, map, ticks }
    }

    /// Bits, as powers of 2.
    fn bits(points: &[Point]) -> Self {
        let (low, high) = extent(points.iter().map(|point| point.bits));
        let ticks = [0.125, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0];
        Self::new(f64::log2, (low / 1.15, high * 1.3), (FRAME.0, FRAME.2), &ticks)
    }

    fn values(kind: Kind, points: &[Point]) -> Self {
        let pixels = (FRAME.3, FRAME.1);
        if kind == Kind::Share {
            return Self::new(|x| x, (0.0, 1.0), pixels, &[0.0, 0.2, 0.4, 0.6, 0.8, 1.0]);
        }
        let shown = points.iter().map(|point| point.value).filter(|value| *value > 0.0);
        let (low, high) = extent(shown.chain(points.iter().filter_map(|p| Some(p.range?.1))));
        let decades = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0];
        let ticks: Vec<_> = decades.iter().flat_map(|d| [*d, 2.0 * d, 5.0 * d]).collect();
        let few = high / low < 50.0;
        let ticks = if few { ticks } else { decades.to_vec() };
        Self::new(f64::log10, (low.max(1e-6) / 2.0, high * 1.3), pixels, &ticks)
    }
}

/// Least and largest; something positive where there is nothing.
fn extent(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let finite = values.filter(|value| value.is_finite() && *value > 0.0);
    let (low, high) = finite.fold((f64::MAX, 0.0), |(l, h), x| (x.min(l), x.max(h)));
    if low > high { (1.0, 2.0) } else { (low, high) }
}

/// Draws caches in a plot.
///
/// # Errors
/// What the drawing refused.
pub fn plot((title, unit): (&str, &str), kind: Kind, points: &[Point]) -> Result<String, Refusal> {
    let (x, y) = (Axis::bits(points), Axis::values(kind, points));
    super::draw::svg(SIZE, |area| {
        write(area, title, (FRAME.0 - 52, 16), (15, LEFT), &INK)?;
        write(area, unit, (FRAME.2, 17), (11, RIGHT), &INK.mix(0.7))?;
        axes(area, (&x, &y), kind)?;
        frontier(area, (&x, &y), kind, points)?;
        dots(area, (&x, &y), kind, points)
    })
}

fn axes(area: &Area<'_>, (x, y): (&Axis, &Axis), kind: Kind) -> Drawn {
    let (faint, grey) = (INK.mix(0.12).stroke_width(1), INK.mix(0.7));
    for &tick in &x.ticks {
        let at = x.at(tick);
        line(area, &[(at, FRAME.1), (at, FRAME.3)], faint)?;
        write(area, &tick.to_string(), (at, FRAME.3 + 14), (11, MIDDLE), &grey)?;
    }
    for &tick in &y.ticks {
        let at = y.at(tick);
        line(area, &[(FRAME.0, at), (FRAME.2, at)], faint)?;
        let name = match kind {
            Kind::Share => format!("{:.0} %", tick * 100.0),
            Kind::Divergence => tick.to_string(),
        };
        write(area, &name, (FRAME.0 - 8, at), (11, RIGHT), &grey)?;
    }
    let middle = i32::midpoint(FRAME.0, FRAME.2);
    write(area, "bits an element", (middle, FRAME.3 + 36), (11, MIDDLE), &grey)
}

/// Whether no other cache of at most as many bits is as good.
fn is_best(kind: Kind, points: &[Point], point: &Point) -> bool {
    let better = |other: &&Point| match kind {
        Kind::Share => {
            other.value > point.value || other.value >= point.value && other.bits < point.bits
        }
        Kind::Divergence => {
            other.value < point.value || other.value <= point.value && other.bits < point.bits
        }
    };
    !points.iter().filter(|other| other.bits <= point.bits).any(|other| better(&other))
}

fn frontier(area: &Area<'_>, (x, y): (&Axis, &Axis), kind: Kind, points: &[Point]) -> Drawn {
    let mut best: Vec<_> = points.iter().filter(|point| is_best(kind, points, point)).collect();
    best.sort_by(|a, b| a.bits.total_cmp(&b.bits));
    let line_of: Vec<_> = best.iter().map(|point| (x.at(point.bits), y.at(point.value))).collect();
    line(area, &line_of, INK.mix(0.35).stroke_width(1))
}

fn dots(area: &Area<'_>, (x, y): (&Axis, &Axis), kind: Kind, points: &[Point]) -> Drawn {
    let at = |point: &Point| (x.at(point.bits), y.at(point.value));
    let mut taken: Vec<_> = points.iter().map(|point| around(at(point), 6)).collect();
    for (point, colour) in points.iter().zip(COLOURS.iter().cycle()) {
        let (px, py) = at(point);
        if let Some((low, high)) = point.range {
            let ends = [(px, y.at(low)), (px, y.at(high))];
            line(area, &ends, colour.mix(0.55).stroke_width(2))?;
        }
        area.draw(&Circle::new((px, py), 5, colour.filled()))?;
        let none = kind == Kind::Divergence && point.value <= 0.0;
        let name = if none { format!("{} (0)", point.name) } else { point.name.clone() };
        let (at, anchor, space) = place(&name, (px, py), &taken);
        taken.push(space);
        write(area, &name, at, (12, anchor), colour)?;
    }
    Ok(())
}

/// Left, top, right, bottom.
type Space = (i32, i32, i32, i32);

fn around((x, y): (i32, i32), half: i32) -> Space {
    (x - half, y - half, x + half, y + half)
}

/// Where a label of a point fits: beside it, above or below, where nothing else stands.
fn place(
    name: &str,
    (x, y): (i32, i32),
    taken: &[Space],
) -> ((i32, i32), plotters::style::text_anchor::Pos, Space) {
    let (width, height) = (name.chars().count() as i32 * LETTER.0, LETTER.1);
    let around = [0, -14, 14, -28, 28, -42, 42, -56, 56];
    let right = around.map(|dy| ((x + 10, y + dy), LEFT, x + 10));
    let left = around.map(|dy| ((x - 10, y + dy), RIGHT, x - 10 - width));
    let spaces = right.into_iter().zip(left).flat_map(|(right, left)| [right, left]).map(
        |(at, anchor, from)| {
            let (top, bottom) = (at.1 - height / 2, at.1 + height / 2);
            (at, anchor, (from, top, from + width, bottom))
        },
    );
    let fits = |(.., space): &((i32, i32), _, Space)| {
        let inside = space.0 > FRAME.0 && space.2 < SIZE.0 as i32;
        inside
            && space.1 > FRAME.1 - 14
            && space.3 < FRAME.3 + 4
            && !taken.iter().any(|t| meet(t, space))
    };
    spaces.clone().find(fits).or_else(|| spaces.clone().next()).unwrap_or((
        (x, y),
        LEFT,
        (x, y, x, y),
    ))
}

fn meet(a: &Space, b: &Space) -> bool {
    a.0 < b.2 && b.0 < a.2 && a.1 < b.3 && b.1 < a.3
}

#[test]
fn intervals_stay_within_their_frame() {
    let point = Point { name: "q2".into(), bits: 2.5, value: 0.02, range: Some((-0.01, 0.05)) };
    let y = Axis::values(Kind::Divergence, &[point]);
    assert_eq!(y.at(-0.01), FRAME.3);
    assert!((FRAME.1..FRAME.3).contains(&y.at(0.05)) && y.at(0.05) < y.at(0.02));
}
