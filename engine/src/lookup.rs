//! Drafts by prompt lookup: a text that repeats itself goes on as it did before (Saxena, 2023, "Prompt lookup decoding").
//!
//! Drafts are checked by the step that they ride on, against the tokens that the model chooses there: the same ones, with
//! the same random draws, that it would have chosen one by one. So they change how many steps a text takes, never the text.

/// Longest run of newest tokens that is looked up.
const LONGEST: usize = 4;
/// Shortest one: a single token says too little about what follows.
const SHORTEST: usize = 2;

/// What followed the latest earlier occurrence of the longest run of newest tokens, `most` tokens at most.
pub fn draft(tokens: &[u32], most: usize) -> &[u32] {
    if most == 0 {
        return &[];
    }
    for run in (SHORTEST..=LONGEST.min(tokens.len().saturating_sub(1))).rev() {
        let (before, newest) = (&tokens[..tokens.len() - 1], &tokens[tokens.len() - run..]);
        if let Some(at) = before.windows(run).rposition(|earlier| earlier == newest) {
            let follows = &tokens[at + run..];
            return &follows[..follows.len().min(most)];
        }
    }
    &[]
}

/// How drafts fared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Drafts {
    /// Tokens drafted.
    pub made: usize,
    /// Drafts that the model chose itself.
    pub taken: usize,
}

impl std::ops::AddAssign for Drafts {
    fn add_assign(&mut self, more: Self) {
        self.made += more.made;
        self.taken += more.taken;
    }
}

impl Drafts {
    /// Of what the model chose after the newest token and after each of `drafts`, the tokens that follow one another:
    /// those up to the first that is not the draft in its place.
    pub fn take<'c>(&mut self, drafts: &[u32], chosen: &'c [u32]) -> &'c [u32] {
        let pairs = drafts.iter().zip(chosen);
        let taken = pairs.take_while(|(draft, chosen)| draft == chosen).count();
        self.made += drafts.len();
        self.taken += taken;
        &chosen[..=taken]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_occurrence_of_the_longest_run_goes_on() {
        //            a  b  c  d  9  b  c  e  8  a  b  c
        let tokens = [1, 2, 3, 4, 9, 2, 3, 5, 8, 1, 2, 3];
        assert_eq!(draft(&tokens, 3), [4, 9, 2], "1 2 3 occurred once, 2 3 later and shorter");
        assert_eq!(draft(&tokens[1..], 2), [5, 8], "without the first 1, 2 3 at its latest place");
        assert_eq!(draft(&tokens[..4], 3), [] as [u32; 0], "nothing occurs twice");
        assert_eq!(draft(&[7, 7, 7, 7], 3), [7], "an occurrence may overlap the newest tokens");
        assert_eq!(draft(&[1], 3), [] as [u32; 0]);
        assert_eq!(draft(&[], 3), [] as [u32; 0]);
        assert_eq!(draft(&tokens, 0), [] as [u32; 0]);
    }

    #[test]
    fn drafts_are_taken_up_to_the_first_that_was_not_chosen() {
        let mut drafts = Drafts::default();
        assert_eq!(drafts.take(&[4, 9, 2], &[4, 9, 3, 7]), [4, 9, 3]);
        assert_eq!(drafts.take(&[4], &[5, 1]), [5]);
        assert_eq!(drafts.take(&[], &[5]), [5]);
        assert_eq!(drafts.take(&[6, 7], &[6, 7, 8]), [6, 7, 8]);
        assert_eq!(drafts, Drafts { made: 6, taken: 4 });
    }
}
