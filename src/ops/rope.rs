//! Rotary position embeddings (Su et al. 2021), with the scalings of the LLaMA family.

use super::Compute;

/// Which elements of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RopeStyle {
    /// `2 i` and `2 i + 1`: architecture `llama`, whose q and k rows GGUF files hold permuted.
    Interleaved,
    /// `i` and `i + n / 2` (GPT-NeoX): architecture `qwen2`.
    Halves,
}

/// Angles of the positions of a step.
#[derive(Default)]
pub struct RopeTable {
    half: usize,
    /// `[row][i]`: cosine and sine.
    turns: Vec<(f32, f32)>,
}

impl RopeTable {
    /// Room for `rows` rows of `half` angles.
    pub fn with_capacity(rows: usize, half: usize) -> Self {
        Self { half, turns: vec![(1.0, 0.0); rows * half] }
    }

    /// Computes the turns of rows at `positions`: angle `i` advances by `frequency[i]` a position, and `magnitude`
    /// scales the result (YaRN).
    pub fn fill(&mut self, on: Compute<'_>, frequency: &[f32], magnitude: f32, positions: &[usize]) {
        self.half = frequency.len();
        let n = positions.len() * self.half;
        if self.turns.len() < n {
            self.turns.resize(n, (1.0, 0.0));
        }
        let turns = &mut self.turns[..n];
        let write = |row: usize, turns: &mut [(f32, f32)]| {
            for (turn, f) in turns.iter_mut().zip(frequency) {
                let (sin, cos) = (positions[row] as f32 * f).sin_cos();
                *turn = (cos * magnitude, sin * magnitude);
            }
        };
        on.team.for_plain_tiles(turns, self.half, (8, usize::MAX), |mut tile| {
            for row in tile.rows() {
                write(row, tile.row(row));
            }
        });
    }

    /// Turns the first `heads` heads of `head_dim` in each row of `x` (rows of `cols` columns).
    pub fn apply(
        &self,
        on: Compute<'_>,
        style: RopeStyle,
        x: &mut [f32],
        cols: usize,
        heads: usize,
        head_dim: usize,
    ) {
        on.team.for_plain_tiles(x, cols, (4, usize::MAX), |mut tile| {
            for row in tile.rows() {
                let turns = &self.turns[row * self.half..][..self.half];
                for head in tile.row(row)[..heads * head_dim].chunks_exact_mut(head_dim) {
                    turn_head(style, head, turns);
                }
            }
        });
    }
}

fn turn_head(style: RopeStyle, head: &mut [f32], turns: &[(f32, f32)]) {
    let half = turns.len();
    match style {
        RopeStyle::Interleaved => {
            for (pair, &(cos, sin)) in head.as_chunks_mut::<2>().0.iter_mut().zip(turns) {
                *pair = [pair[0] * cos - pair[1] * sin, pair[0] * sin + pair[1] * cos];
            }
        }
        RopeStyle::Halves => {
            let (low, high) = head.split_at_mut(half);
            for ((a, b), &(cos, sin)) in low.iter_mut().zip(high).zip(turns) {
                (*a, *b) = (*a * cos - *b * sin, *a * sin + *b * cos);
            }
        }
    }
}
