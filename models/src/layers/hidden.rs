//! Final hidden states on the host: the residual stream after the last layer, normed in f32 as no logits need it.

use super::loader::Loader;
use super::norm::NormKind;
use crate::ModelError;
use rill_kernels::Backend;

/// The final norm, applied where there is one row now and then: on the host, whatever the device.
pub(crate) struct HostNorm {
    kind: NormKind,
    weight: Vec<f32>,
    bias: Option<Vec<f32>>,
    eps: f32,
}

impl HostNorm {
    pub(crate) fn load<B: Backend>(
        loader: &Loader<'_, B>,
        name: &str,
        kind: NormKind,
        width: usize,
    ) -> Result<HostNorm, ModelError> {
        let mut weight = loader.weights.vector(&format!("{name}.weight"), width)?;
        weight.iter_mut().for_each(|w| *w += loader.config.norm_weight_offset);
        let bias = match kind {
            NormKind::RootMeanSquare => None,
            NormKind::Layer => loader.vector_if_there(&format!("{name}.bias"), width)?,
        };
        Ok(HostNorm { kind, weight, bias, eps: loader.config.norm_eps })
    }

    /// Norms one row. Sums are in f64, from the first column to the last.
    pub(crate) fn apply(&self, row: &mut [f32]) {
        let count = row.len() as f64;
        let mean = match self.kind {
            NormKind::RootMeanSquare => 0.0,
            NormKind::Layer => row.iter().map(|&x| f64::from(x)).sum::<f64>() / count,
        };
        let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
        let scale = 1.0 / (variance + f64::from(self.eps)).sqrt();
        for (column, x) in row.iter_mut().enumerate() {
            let normed = ((f64::from(*x) - mean) * scale) as f32 * self.weight[column];
            *x = normed + self.bias.as_ref().map_or(0.0, |bias| bias[column]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds() {
        let norm = |kind, bias| HostNorm { kind, weight: vec![1.0, 2.0], bias, eps: 0.0 };
        let mut row = [3.0, 4.0];
        norm(NormKind::RootMeanSquare, None).apply(&mut row);
        let root = 12.5_f32.sqrt();
        assert!((row[0] - 3.0 / root).abs() < 1e-6 && (row[1] - 8.0 / root).abs() < 1e-6, "{row:?}");
        let mut row = [3.0, 5.0];
        norm(NormKind::Layer, Some(vec![0.5, 0.0])).apply(&mut row);
        assert_eq!(row, [-0.5, 2.0]);
    }
}
