//! Recovery, layer by layer on the activations that the converted layers before it leave.

use super::ConvertError;
use super::kept::Kept;
use super::learn::{Streams, see};
use crate::model::{Layer, Model};
use crate::source::Source;
use crate::watch::Watch;

/// A way to make layer `n` of a staged model give what the source's gives. It passes the streams `before` through that layer
/// of the source; `now` are those that the converted layers before it leave.
pub trait Recovery {
    fn layer(
        &self,
        staged: &mut Source,
        n: usize,
        before: &mut Streams,
        now: &Streams,
        watch: &mut Watch<'_>,
    ) -> Result<(), ConvertError>;
}

/// Every layer of `staged`, which has been converted, on the streams of some texts; those that are `kept` as they are.
pub fn recover(
    recovery: &impl Recovery,
    (source, model): (&Source, &Model<'_>),
    staged: &mut Source,
    kept: &Kept,
    mut before: Streams,
    watch: &mut Watch<'_>,
) -> Result<(), ConvertError> {
    let (layers, mut done) = (source.config.layers, 0);
    while done < layers && kept.take(staged, done)? {
        done += 1;
    }
    let mut now = before.clone();
    for n in 0..if done < layers { layers } else { 0 } {
        if n < done {
            let layer = Layer::new(&source.weights, &source.config, n)?;
            for before in &mut before {
                see(model, &layer, before, watch)?;
            }
        } else {
            recovery.layer(staged, n, &mut before, &now, watch)?;
            kept.keep(staged, n)?;
        }
        let layer = Layer::new(&staged.weights, &staged.config, n)?;
        for now in &mut now {
            see(model, &layer, now, watch)?;
        }
    }
    Ok(())
}
