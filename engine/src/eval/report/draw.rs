//! An SVG that stands in a page: it takes the page's ink and letters, so that it suits a light and a dark one.

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Stands for the page's own colour of text.
pub const INK: RGBColor = RGBColor(1, 2, 3);
/// Colours of caches, in their order; all can be read on white and on black.
pub const COLOURS: [RGBColor; 8] = [
    RGBColor(0x2a, 0x9d, 0x8f),
    RGBColor(0xe7, 0x6f, 0x51),
    RGBColor(0x5b, 0x8d, 0xef),
    RGBColor(0xc9, 0x88, 0x1f),
    RGBColor(0x9b, 0x6b, 0xc4),
    RGBColor(0xd1, 0x49, 0x5b),
    RGBColor(0x5f, 0x7d, 0x8c),
    RGBColor(0x3f, 0x9e, 0x4d),
];

/// Something that can be drawn on.
pub type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
/// What a drawing can refuse, though a backend that writes a string has no reason to.
pub type Refusal = DrawingAreaErrorKind<std::io::Error>;
/// Something was drawn.
pub type Drawn = Result<(), Refusal>;

/// An SVG of this size, in pixels.
///
/// # Errors
/// What the drawing refused.
pub fn svg(size: (u32, u32), what: impl FnOnce(&Area<'_>) -> Drawn) -> Result<String, Refusal> {
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, size).into_drawing_area();
    what(&area)?;
    area.present()?;
    drop(area);
    // In a page it needs no namespace; its size follows the page's.
    let (width, height) = size;
    let head = format!("<svg width=\"{width}\" height=\"{height}\"");
    Ok(text
        .replacen(&head, "<svg", 1)
        .replace(" xmlns=\"http://www.w3.org/2000/svg\"", "")
        .replace("\"#010203\"", "\"currentColor\"")
        .replace("font-family=\"page\"", "font-family=\"inherit\""))
}

/// Where the point lies that a text is placed by.
pub const LEFT: Pos = Pos { h_pos: HPos::Left, v_pos: VPos::Center };
/// See [`LEFT`].
pub const RIGHT: Pos = Pos { h_pos: HPos::Right, v_pos: VPos::Center };
/// See [`LEFT`].
pub const MIDDLE: Pos = Pos { h_pos: HPos::Center, v_pos: VPos::Center };

/// Writes a text at a point.
pub fn write<C: Color>(
    area: &Area<'_>,
    text: &str,
    at: (i32, i32),
    (size, anchor): (i32, Pos),
    colour: &C,
) -> Drawn {
    // The backend takes points of 1.24 pixels.
    let style = TextStyle::from(("page", f64::from(size) * 1.24)).color(colour).pos(anchor);
    area.draw(&Text::new(text.to_owned(), at, style))
}

/// A line from point to point.
pub fn line(area: &Area<'_>, points: &[(i32, i32)], style: ShapeStyle) -> Drawn {
    area.draw(&PathElement::new(points.to_vec(), style))
}
