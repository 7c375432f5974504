//! How many tokens each layer and head keeps, those that are protected left out.

use kvwarp::token_select;

use super::choose::Scored;

/// Share of an even budget that the last layer of a pyramid has: the inverse of PyramidKV's beta.
const PYRAMID: usize = 20;
/// Most that a layer of DynamicKV holds on to, in even budgets.
pub const DYNAMIC_MOST: usize = 10;
/// Layers after which DynamicKV settles budgets anew.
pub const DYNAMIC_PERIOD: usize = 4;

/// Of layer `layer` of `layers`, which keep `even` tokens a head on average and have `open` to choose from: a straight
/// line from twice the average, less the last layer's, down to a twentieth.
pub fn pyramid(even: usize, open: usize, layer: usize, layers: usize) -> usize {
    let (least, most) = (even / PYRAMID, 2 * even - even / PYRAMID);
    let (least, most) =
        if most > open { (2 * even - open.min(2 * even), open) } else { (least, most) };
    let steps = layers.saturating_sub(1).max(1);
    most - (most - least.min(most)) * layer / steps
}

/// `total` tokens a head of all layers, so that each layer keeps the same share of its whole score as far as that goes:
/// whoever keeps the least gets the next token.
pub fn prefix(layers: &[Scored], total: usize) -> Vec<usize> {
    let curves: Vec<Vec<f64>> = layers.iter().map(curve).collect();
    let room: usize = curves.iter().map(Vec::len).sum();
    let total = total.min(room);
    // The level that takes no more than `total`, then what is left, a token at a time.
    let taken = |level: f64| -> Vec<usize> {
        curves.iter().map(|curve| curve.partition_point(|&mass| mass <= level)).collect()
    };
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..64 {
        let middle = 0.5 * (low + high);
        let fits = taken(middle).iter().sum::<usize>() <= total;
        if fits { low = middle } else { high = middle }
    }
    let mut budgets =
        if taken(low).iter().sum::<usize>() <= total { taken(low) } else { vec![0; curves.len()] };
    for _ in budgets.iter().sum::<usize>()..total {
        let mass = |l: &usize| budgets[*l].checked_sub(1).map_or(0.0, |last| curves[*l][last]);
        let open = (0..curves.len()).filter(|&l| budgets[l] < curves[l].len());
        if let Some(least) = open.min_by(|a, b| mass(a).total_cmp(&mass(b))) {
            budgets[least] += 1;
        }
    }
    budgets
}

/// Share of a layer's score, over its heads, that its best `i + 1` tokens have.
fn curve(layer: &Scored) -> Vec<f64> {
    let sum = |i| (0..layer.heads()).map(|h| f64::from(layer.of(h)[i])).sum::<f64>();
    let mut importance: Vec<f64> = (0..layer.open()).map(sum).collect();
    importance.sort_unstable_by(|a, b| b.total_cmp(a));
    let whole: f64 = importance.iter().sum();
    let mut mass = 0.0;
    let running = importance.iter().map(|x| {
        mass += x;
        if whole > 0.0 { mass / whole } else { 0.0 }
    });
    running.collect()
}

/// `total` tokens a head of all layers, to each in proportion to how many of the best `total` scores of a head, over all
/// layers and heads, are its own; none more than its heads hold.
pub fn dynamic(layers: &[Scored], total: usize) -> Vec<usize> {
    let heads = layers.first().map_or(0, Scored::heads);
    let all: Vec<f32> =
        layers.iter().flat_map(|l| (0..heads).flat_map(|h| l.of(h))).copied().collect();
    let mut counts = vec![0; layers.len()];
    let ends = layers.iter().scan(0, |end, layer| {
        *end += heads * layer.open();
        Some(*end)
    });
    let ends: Vec<usize> = ends.collect();
    for i in token_select::top_k(&all, total * heads) {
        counts[ends.partition_point(|&end| end <= i as usize)] += 1;
    }
    let room: Vec<usize> = layers.iter().map(|layer| layer.holds()).collect();
    share(total, &counts, &room)
}

/// `total` in proportion to `weights`, none over its `room`: whole parts first, then the largest remainders; what has no
/// room goes to the others.
pub fn share(total: usize, weights: &[usize], room: &[usize]) -> Vec<usize> {
    let mut parts = vec![0; weights.len()];
    let mut left = total.min(room.iter().sum());
    while left > 0 {
        let open: Vec<usize> = (0..parts.len()).filter(|&i| parts[i] < room[i]).collect();
        let whole: usize = open.iter().map(|&i| weights[i]).sum();
        let weight = |i: usize| if whole == 0 { 1 } else { weights[i] };
        let whole = if whole == 0 { open.len() } else { whole };
        let mut given = 0;
        for &i in &open {
            let more = (left * weight(i) / whole).min(room[i] - parts[i]);
            parts[i] += more;
            given += more;
        }
        if given == 0 {
            let remainder = |i: &usize| (left * weight(*i)) % whole;
            let next = open.into_iter().max_by_key(|i| (remainder(i), std::cmp::Reverse(*i)));
            next.into_iter().for_each(|i| parts[i] += 1);
            given = 1;
        }
        left -= given;
    }
    parts
}

/// The best `total` scores of all layers and heads, as tokens of each, counted from the first that is not protected.
/// `strictly`: those above the one that would be the last, which KVzip leaves out with all its equals.
pub fn global(layers: &[Scored], total: usize, strictly: bool) -> Vec<Vec<Vec<u32>>> {
    let all = layers.iter().flat_map(|l| (0..l.heads()).flat_map(move |h| l.of(h)));
    let all: Vec<f32> = all.copied().collect();
    let best = match strictly {
        true => token_select::kth(&all, total.max(1))
            .map_or(Vec::new(), |last| token_select::above(&all, last)),
        false => token_select::top_k(&all, total),
    };
    let (mut best, mut base) = (best.into_iter().peekable(), 0);
    let mut of_head = |open: usize| {
        let (first, end) = (base, base + open as u32);
        base = end;
        let mut mine = Vec::new();
        while let Some(i) = best.next_if(|i| *i < end) {
            mine.push(i - first);
        }
        mine
    };
    layers.iter().map(|l| (0..l.heads()).map(|_| of_head(l.open())).collect()).collect()
}
