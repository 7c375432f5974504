//! Budgets and choices against hand-worked numbers and the invariants of the papers.

use proptest::prelude::*;

use super::budget::{dynamic, global, prefix, pyramid, share};
use super::choose::Scored;
use super::{Refine, Share};
use crate::policy::parse;

fn scored(scores: &[&[f32]], protects: (usize, usize)) -> Scored {
    let n = scores[0].len();
    let held = vec![(0..n as u32).collect(); scores.len()];
    Scored { n, scores: scores.concat(), protects, held, first: vec![0; scores.len()] }
}

#[test]
fn shares_are_exact() {
    for (text, n, of) in
        [("0.25", 7, 1), ("1", 9, 9), ("0", 9, 0), ("0.3333", 30_000, 9999), ("0.1", 2048, 204)]
    {
        assert_eq!(Share::parse(text).unwrap().of(n), of, "{text} of {n}");
        assert_eq!(Share::parse(text).unwrap().to_string(), text);
    }
    for text in ["", ".5", "1.0001", "2", "0.12345", "-0.1", "1e-1", "0,5"] {
        assert_eq!(Share::parse(text), None, "{text}");
    }
}

#[test]
fn the_best_stay_beside_the_protected_and_ties_go_to_the_older() {
    let layer = scored(&[&[9.0, 1.0, 3.0, 3.0, f32::NAN, 2.0, 9.0, 9.0]], (1, 2));
    assert_eq!(layer.open(), 5);
    assert_eq!(layer.best(0, 1), [0, 2, 6, 7]);
    assert_eq!(layer.best(0, 3), [0, 2, 3, 5, 6, 7]);
    assert_eq!(layer.best(0, 0), [0, 6, 7]);
    assert_eq!(layer.best(0, 99), (0..8).collect::<Vec<u32>>());
    let all = scored(&[&[1.0, 2.0]], (4, 4));
    assert_eq!((all.open(), all.best(0, 0)), (0, vec![0, 1]));
}

#[test]
fn narrowing_twice_names_slots_among_those_still_held() {
    let mut layer = scored(&[&[0.0; 8]], (0, 0));
    layer.first = vec![10];
    assert_eq!(layer.narrow(0, vec![1, 3, 4, 7]), [11, 13, 14, 17]);
    assert_eq!(layer.narrow(0, vec![3, 7]), [11, 13]);
    assert_eq!(layer.holds(), 2);
}

/// Two heads, three best of six each for the bits, so tokens differ by which heads would keep them.
#[test]
fn representatives_fill_what_the_best_leave() {
    let layer = scored(&[&[6.0, 5.0, 4.0, 3.0, 2.0, 1.0], &[1.0, 6.0, 2.0, 5.0, 3.0, 4.0]], (0, 0));
    let refine = Refine {
        share: Share::parse("0.5").unwrap(),
        ..parse::refine("kvcrush:0.5:zeros").unwrap()
    };
    // Head 0 keeps 0 and 1 as its best; bits (head 1, head 0): 0 01, 1 11, 2 00, 3 10, 4 00, 5 00. By distance to
    // zeros: 2, 4, 5, 3; both ends of that order.
    assert_eq!(layer.refined(0, 4, &refine), [0, 1, 2, 3]);
    let none = Refine { share: Share::parse("0").unwrap(), ..refine };
    assert_eq!(layer.refined(0, 4, &none), layer.best(0, 4));
}

#[test]
fn a_pyramid_is_a_line_of_the_same_mean() {
    let budgets: Vec<_> = (0..4).map(|layer| pyramid(100, 1000, layer, 4)).collect();
    assert_eq!(budgets, [195, 132, 69, 5]);
    // No layer has more than there is: the others have the rest.
    let budgets: Vec<_> = (0..2).map(|layer| pyramid(60, 80, layer, 2)).collect();
    assert_eq!(budgets, [80, 40]);
    assert_eq!(pyramid(10, 10, 0, 1), 10);
}

/// Mass 8, 4, 2, 1, 1 of 16 and four equal ones of 4: at half of each, one and two tokens.
#[test]
fn a_prefix_is_the_same_share_of_every_layer() {
    let layers =
        [scored(&[&[1.0, 8.0, 2.0, 4.0, 1.0]], (0, 0)), scored(&[&[3.0, 3.0, 3.0, 3.0]], (0, 0))];
    assert_eq!(prefix(&layers, 3), [1, 2]);
    assert_eq!(prefix(&layers, 9), [5, 4]);
    assert_eq!(prefix(&layers, 0), [0, 0]);
    assert_eq!(prefix(&layers, 50), [5, 4]);
    assert_eq!(prefix(&[scored(&[&[0.0; 3]], (0, 0))], 2), [2]);
}

#[test]
fn dynamic_budgets_follow_the_best_of_all_layers() {
    let mut layers = [
        scored(&[&[9.0, 8.0, 7.0, 0.0], &[9.0, 8.0, 0.0, 0.0]], (0, 0)),
        scored(&[&[1.0, 1.0, 1.0, 6.0], &[1.0, 1.0, 1.0, 1.0]], (0, 0)),
    ];
    // Of the best six, five and one: 2.5 and 0.5 of three tokens a head.
    assert_eq!(dynamic(&layers, 3), [3, 0]);
    // Never more than is held.
    layers[0].narrow(0, vec![0, 1]);
    assert_eq!(dynamic(&layers, 3), [2, 1]);
}

#[test]
fn a_global_budget_is_exact_or_strict() {
    let layers = [scored(&[&[5.0, 1.0, 4.0], &[4.0, 4.0, 0.0]], (0, 0))];
    assert_eq!(global(&layers, 3, false), [[vec![0, 2], vec![0]]]);
    // The third best is 4, which goes with all its equals.
    assert_eq!(global(&layers, 3, true), [[vec![0], vec![]]]);
    assert_eq!(global(&layers, 6, false), [[vec![0, 1, 2], vec![0, 1, 2]]]);
}

proptest! {
    #[test]
    fn parts_add_up_and_fit(
        total in 0..200usize,
        of in prop::collection::vec((0..50usize, 0..60usize), 1..8),
    ) {
        let (weights, room): (Vec<_>, Vec<_>) = of.into_iter().unzip();
        let parts = share(total, &weights, &room);
        prop_assert_eq!(parts.iter().sum::<usize>(), total.min(room.iter().sum()));
        prop_assert!(parts.iter().zip(&room).all(|(part, room)| part <= room));
    }

    #[test]
    fn layer_budgets_add_up_and_fit(
        scores in prop::collection::vec(prop::collection::vec(0u8..20, 24), 1..6),
        total in 0..100usize,
    ) {
        let layer = |row: &Vec<u8>| {
            let scores: Vec<f32> = row.iter().map(|&x| f32::from(x)).collect();
            scored(&[&scores[..12], &scores[12..]], (1, 2))
        };
        let layers: Vec<_> = scores.iter().map(layer).collect();
        let most = 9 * layers.len();
        for budgets in [prefix(&layers, total), dynamic(&layers, total)] {
            prop_assert_eq!(budgets.iter().sum::<usize>(), total.min(most));
            prop_assert!(budgets.iter().all(|&k| k <= 9));
        }
        let chosen = global(&layers, total, false);
        let kept = |heads: &Vec<Vec<u32>>| heads.iter().map(Vec::len).sum::<usize>();
        prop_assert_eq!(chosen.iter().map(kept).sum::<usize>(), total.min(2 * most));
        // What a smaller budget keeps, a larger one keeps too.
        let larger = global(&layers, total + 7, false);
        for (some, more) in chosen.iter().flatten().zip(larger.iter().flatten()) {
            prop_assert!(some.iter().all(|token| more.contains(token)));
        }
    }

    #[test]
    fn refined_choices_have_no_duplicates_and_the_same_number(
        scores in prop::collection::vec(prop::collection::vec(0u8..9, 30), 1..5),
        k in 0..40usize,
        percent in 0..=100usize,
        held in prop::collection::vec(any::<bool>(), 30),
    ) {
        let rows: Vec<Vec<f32>> = scores.iter().map(|row| row.iter().map(|&x| x.into()).collect()).collect();
        let rows: Vec<&[f32]> = rows.iter().map(|row| &row[..]).collect();
        let mut layer = scored(&rows, (2, 3));
        let text = format!("kvcrush:{}", percent as f64 / 100.0);
        let refined = layer.refined(0, k, &parse::refine(&text).unwrap());
        prop_assert_eq!(refined.len(), 5 + k.min(25));
        prop_assert!(refined.is_sorted_by(|a, b| a < b));
        // Only what is held can stand for the rest.
        let best = layer.best(0, k);
        let alive = |i: &u32| best.contains(i) || held[*i as usize] || *i < 2 || *i >= 27;
        layer.held[0].retain(alive);
        let refined = layer.refined(0, k, &parse::refine(&text).unwrap());
        prop_assert!(refined.iter().all(|token| layer.held[0].contains(token)));
    }
}
