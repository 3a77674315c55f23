//! A linear model of noisy observations that forgets: weights of least squares over the latest ones, none negative.

/// Weight of what was known, an observation.
const MEMORY: f64 = 0.98;
/// Added to each feature's moment, where the observations' own sum up to about 50 for a feature about 1: decides what
/// observations that are all alike leave open, in favour of small weights.
const RIDGE: f64 = 1e-3;
/// Observations after which an outlier is told from what is not known yet.
const OBSERVATIONS_TO_KNOW: u64 = 8;
/// An outlier counts for no more than so many times what was expected.
const OUTLIER: f64 = 4.0;

/// Weights of `N` features, each usually about 1, solved for anew from the moments with each observation: updating an
/// inverse instead (recursive least squares) diverges once all observations are alike.
#[derive(Debug)]
pub(crate) struct LeastSquares<const N: usize> {
    weights: [f64; N],
    /// Sums over the observations, later ones weighing more: products of two features, and of a feature and the value.
    moments: [[f64; N]; N],
    responses: [f64; N],
    observations: u64,
}

impl<const N: usize> LeastSquares<N> {
    pub(crate) fn predict(&self, features: [f64; N]) -> f64 {
        self.weights.iter().zip(features).map(|(weight, feature)| weight * feature).sum()
    }

    #[cfg(test)]
    fn weights(&self) -> [f64; N] {
        self.weights
    }

    /// `value` came of `features`.
    pub(crate) fn observe(&mut self, features: [f64; N], value: f64) {
        let known = self.observations >= OBSERVATIONS_TO_KNOW;
        let value = if known { value.min(OUTLIER * self.predict(features)) } else { value };
        for ((row, response), a) in self.moments.iter_mut().zip(&mut self.responses).zip(features) {
            for (moment, b) in row.iter_mut().zip(features) {
                *moment = *moment * MEMORY + a * b;
            }
            *response = *response * MEMORY + a * value;
        }
        self.weights = self.solve();
        self.observations += 1;
    }

    /// The weights that fit best; the most negative one is held at 0 until there is none.
    fn solve(&self) -> [f64; N] {
        let mut held = [false; N];
        loop {
            let mut moments = self.moments;
            let mut responses = self.responses;
            for i in 0..N {
                moments[i][i] += RIDGE;
                if held[i] {
                    moments[i] = [0.0; N];
                    moments.iter_mut().for_each(|row| row[i] = 0.0);
                    (moments[i][i], responses[i]) = (1.0, 0.0);
                }
            }
            let weights = solve_positive_definite(moments, responses);
            let negative = (0..N).filter(|&i| weights[i] < 0.0);
            match negative.min_by(|&i, &j| weights[i].total_cmp(&weights[j])) {
                Some(worst) => held[worst] = true,
                None => return weights,
            }
        }
    }
}

impl<const N: usize> Default for LeastSquares<N> {
    fn default() -> Self {
        LeastSquares { weights: [0.0; N], moments: [[0.0; N]; N], responses: [0.0; N], observations: 0 }
    }
}

/// Gaussian elimination; such a matrix needs no pivoting.
fn solve_positive_definite<const N: usize>(mut a: [[f64; N]; N], mut b: [f64; N]) -> [f64; N] {
    for pivot in 0..N {
        for row in pivot + 1..N {
            let factor = a[row][pivot] / a[pivot][pivot];
            let above = a[pivot];
            a[row].iter_mut().zip(above).for_each(|(value, above)| *value -= factor * above);
            b[row] -= factor * b[pivot];
        }
    }
    for row in (0..N).rev() {
        let known: f64 = (row + 1..N).map(|column| a[row][column] * b[column]).sum();
        b[row] = (b[row] - known) / a[row][row];
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Features that vary tell the weights, and more observations, however many and however alike, untell nothing.
        #[test]
        fn the_true_weights_are_found(
            truth in prop::array::uniform3(0.0f64..2.0),
            steps in prop::collection::vec((0.1f64..1.0, 0.0f64..1.0), 100..300),
            alike in 0usize..20_000,
        ) {
            let mut fit = LeastSquares::default();
            let value = |features: [f64; 3]| truth.iter().zip(features).map(|(a, b)| a * b).sum::<f64>();
            for &(a, b) in &steps {
                fit.observe([1.0, a, b], value([1.0, a, b]));
            }
            for weights in fit.weights().iter().zip(truth) {
                prop_assert!((weights.0 - weights.1).abs() < 0.05, "{:?} for {truth:?}", fit.weights());
            }
            for _ in 0..alike {
                fit.observe([1.0, 0.5, 0.5], value([1.0, 0.5, 0.5]));
            }
            let (found, wanted) = (fit.predict([1.0, 0.5, 0.5]), value([1.0, 0.5, 0.5]));
            prop_assert!((found - wanted).abs() < 0.01 * wanted + 1e-3, "{found} for {wanted}");
        }

        /// Whatever is observed, what was just observed over and over is predicted, and no weight is negative.
        #[test]
        fn weights_stay_finite_and_none_is_negative(values in prop::collection::vec((0.0f64..40.0, 0.0f64..1.0), 0..400)) {
            let mut fit = LeastSquares::default();
            for (step, &(a, value)) in values.iter().enumerate() {
                fit.observe([1.0, a, step as f64 / 100.0], value);
                prop_assert!(fit.weights().iter().all(|weight| weight.is_finite() && *weight >= 0.0));
            }
        }
    }

    #[test]
    fn one_outlier_is_not_believed() {
        let mut fit = LeastSquares::default();
        for _ in 0..40 {
            fit.observe([1.0, 0.5], 1.0);
        }
        fit.observe([1.0, 0.5], 1000.0);
        assert!(fit.predict([1.0, 0.5]) < 1.2);
    }
}
