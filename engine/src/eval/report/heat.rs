//! Right answers by length and depth, the fuller a cell the more of them.

use plotters::prelude::*;

use super::draw::{COLOURS, INK, LEFT, MIDDLE, RIGHT, Refusal, write};
use crate::eval::summary::Place;

/// Width and height of a cell, and what stands left of and above all.
const CELL: (i32, i32) = (64, 34);
const MARGIN: (i32, i32) = (58, 46);

/// Draws a grid: a column a length, a row a depth.
///
/// # Errors
/// What the drawing refused.
pub fn heat(title: &str, places: &[Place]) -> Result<String, Refusal> {
    let mut lengths: Vec<_> = places.iter().map(|place| place.tokens).collect();
    let mut depths: Vec<_> = places.iter().map(|place| place.depth).collect();
    lengths.dedup();
    depths.sort_unstable();
    depths.dedup();
    let corner = |column: usize, row: usize| {
        (MARGIN.0 + column as i32 * CELL.0, MARGIN.1 + row as i32 * CELL.1)
    };
    let (width, height) = corner(lengths.len(), depths.len());
    let size = ((width + 8).max(200) as u32, (height + 8) as u32);
    let middle = |(x, y): (i32, i32)| (x + CELL.0 / 2, y + CELL.1 / 2);
    super::draw::svg(size, |area| {
        write(area, title, (4, 12), (13, LEFT), &INK)?;
        for (column, tokens) in lengths.iter().enumerate() {
            let (x, y) = middle(corner(column, 0));
            write(area, &count(*tokens), (x, y - CELL.1 + 6), (11, MIDDLE), &INK.mix(0.7))?;
        }
        for (row, depth) in depths.iter().enumerate() {
            let (x, y) = (MARGIN.0 - 8, middle(corner(0, row)).1);
            write(area, &format!("{depth} %"), (x, y), (11, RIGHT), &INK.mix(0.7))?;
        }
        for place in places {
            let column = lengths.iter().position(|tokens| *tokens == place.tokens).unwrap_or(0);
            let row = depths.iter().position(|depth| *depth == place.depth).unwrap_or(0);
            let (x, y) = corner(column, row);
            let (from, to) = ((x + 1, y + 1), (x + CELL.0 - 1, y + CELL.1 - 1));
            let share = place.found.share;
            area.draw(&Rectangle::new([from, to], COLOURS[0].mix(share * 0.8).filled()))?;
            area.draw(&Rectangle::new([from, to], INK.mix(0.15).stroke_width(1)))?;
            let text = format!("{}/{}", place.found.hits, place.found.n);
            write(area, &text, middle((x, y)), (12, MIDDLE), &INK)?;
        }
        Ok(())
    })
}

/// A number of tokens, in units of 1,024 where it is whole.
pub fn count(tokens: usize) -> String {
    match tokens {
        n if n >= 1024 && n.is_multiple_of(1024) => format!("{}k", n / 1024),
        n => n.to_string(),
    }
}
