//! Linear layers of every type and shape: close to the plain definition, and the same bits however they are computed.

use crate::inputs::{
    ALL, Numbers, backends, backends_with, cases, describe, difference, load_f32, matrix, product, rows,
    scale_offsets, stored_bytes,
};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use rill_kernels::{Backend, CpuBackend, DTYPES, Dtype, Form, Linear, Matrix, RowDtype, Rows, Stored, reference};
use std::cell::RefCell;

/// Rounding of f32 sums, relative to the sum of absolute products.
const TOLERANCE: f64 = 1e-5;

/// One layer and its input.
#[derive(Debug, Clone)]
struct Case {
    /// Types and outputs of the matrices side by side.
    parts: Vec<(Dtype, usize)>,
    cols: usize,
    tokens: usize,
    seed: u64,
}

/// A case's numbers.
struct Operands {
    data: Vec<Vec<u8>>,
    x: Vec<f32>,
}

impl Case {
    fn width(&self) -> usize {
        self.parts.iter().map(|part| part.1).sum()
    }

    fn operands(&self) -> Operands {
        let mut numbers = Numbers(self.seed);
        let data =
            self.parts.iter().map(|&(dtype, rows)| stored_bytes(dtype, rows, self.cols, &mut numbers)).collect();
        Operands { data, x: numbers.activations(self.tokens * self.cols) }
    }

    fn stored<'a>(&self, operands: &'a Operands) -> Vec<Stored<'a>> {
        let part =
            |(&(dtype, rows), data): (&(Dtype, usize), &'a Vec<u8>)| Stored { dtype, rows, cols: self.cols, data };
        self.parts.iter().zip(&operands.data).map(part).collect()
    }

    fn load(&self, backend: &mut CpuBackend, operands: &Operands) -> Linear {
        backend.load_linear(&self.stored(operands)).expect("sound weights")
    }
}

fn is_float(dtype: Dtype) -> bool {
    dtype.block_len() == 1
}

/// Holds `given` against the plain definition.
fn against_reference(case: &Case, operands: &Operands, dtype: RowDtype, given: &[f32]) -> Result<(), String> {
    let width = case.width();
    let mut first = 0;
    for stored in case.stored(operands) {
        let weights = reference::weights(stored);
        for (token, x) in operands.x.chunks_exact(case.cols).enumerate() {
            let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
            let sums = match stored.dtype {
                Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q4_K => reference::linear_four(stored, x),
                Dtype::BF16 if dtype == RowDtype::Bf16 => {
                    reference::linear(&weights, &wide(&reference::round_bf16(x)))
                }
                other if is_float(other) => reference::linear(&weights, &wide(x)),
                _ => reference::linear(&weights, &reference::shift_row(x)),
            };
            for (row, expected) in sums.into_iter().enumerate() {
                let value = f64::from(given[token * width + first + row]);
                let error = (value - expected.value).abs();
                if error.is_nan() || error > TOLERANCE * expected.magnitude {
                    let dtype = stored.dtype;
                    return Err(format!("{dtype:?} row {row}, token {token}: {value:e}, not {expected:?}"));
                }
            }
        }
        first += stored.rows;
    }
    Ok(())
}

/// Everything that must hold of one case.
fn check(backends: &mut [CpuBackend], case: &Case) -> Result<(), String> {
    let operands = case.operands();
    let (width, cols) = (case.width(), case.cols);
    let mut numbers = Numbers(!case.seed);
    let residual: Vec<f32> = (0..case.tokens * width).map(|_| numbers.normal()).collect();
    let mut expected: Option<Vec<f32>> = None;
    for backend in backends {
        let who = describe(backend);
        let layer = case.load(backend, &operands);
        let x = rows(backend, &operands.x, cols);
        let given = product(backend, &layer, &x);
        match &expected {
            None => against_reference(case, &operands, backend.row_dtype(), &given)
                .map_err(|e| format!("{who}: {e}"))?,
            Some(expected) => same(&given, expected, &who, "another backend's result")?,
        }
        let expected = expected.get_or_insert(given);

        // A row alone, and rows in other company and order.
        let alone = numbers.below(case.tokens);
        let mut company: Vec<usize> = (0..case.tokens).filter(|_| numbers.below(2) == 0).collect();
        numbers.shuffle(&mut company);
        for chosen in [vec![alone], company] {
            let pick = |of: &[f32], width: usize| -> Vec<f32> {
                chosen.iter().flat_map(|&r| of[r * width..][..width].to_vec()).collect()
            };
            let x = rows(backend, &pick(&operands.x, cols), cols);
            same(&product(backend, &layer, &x), &pick(expected, width), &who, "rows in other company")?;
        }

        let mut out = Matrix::default();
        backend.linear(&layer, &x, &mut out);
        same(&backend.read(&out, 0..case.tokens), expected, &who, "linear and logits")?;
        let mut out = matrix(backend, &residual, width);
        backend.linear_add(&layer, &x, &mut out);
        let sum: Vec<f32> = residual.iter().zip(expected.iter()).map(|(r, x)| r + x).collect();
        same(&backend.read(&out, 0..case.tokens), &sum, &who, "linear_add and linear + add")?;
    }
    Ok(())
}

fn same(given: &[f32], expected: &[f32], who: &str, what: &str) -> Result<(), String> {
    difference(given, expected).map_or(Ok(()), |d| Err(format!("{who}: {what}: {d}")))
}

#[test]
fn every_type_is_close_to_its_definition_and_the_same_everywhere() {
    let (mut exact, mut rounding) = (backends(), backends_with(RowDtype::Bf16));
    for (index, dtype) in DTYPES.into_iter().enumerate() {
        for (rows, tokens, cols) in [(1, 1, 256), (16, 17, 512), (31, 23, 256), (50, 70, 768), (17, 133, 2048)] {
            let case = Case { parts: vec![(dtype, rows)], cols, tokens, seed: index as u64 };
            check(&mut exact, &case).unwrap_or_else(|e| panic!("{case:?}: {e}"));
            if dtype == Dtype::BF16 {
                check(&mut rounding, &case).unwrap_or_else(|e| panic!("{case:?}, rounding: {e}"));
            }
        }
    }
}

#[test]
fn layers_of_any_shape_and_mixture_are_the_same_everywhere() {
    let parts = prop::collection::vec((0..DTYPES.len(), 1_usize..=70), 1..=3);
    let strategy = (parts, 1_usize..=20, 1_usize..=70, any::<u64>()).prop_map(|(parts, groups, tokens, seed)| {
        let parts: Vec<(Dtype, usize)> = parts.into_iter().map(|(dtype, rows)| (DTYPES[dtype], rows)).collect();
        let wide = parts.iter().any(|part| part.0.block_len() == 256);
        let cols = if wide { groups.div_ceil(8) * 256 } else { groups * 32 };
        Case { parts, cols, tokens, seed }
    });
    for dtype in [RowDtype::F32, RowDtype::Bf16] {
        let backends = RefCell::new(backends_with(dtype));
        let result = TestRunner::new(cases(32))
            .run(&strategy, |case| check(&mut backends.borrow_mut(), &case).map_err(TestCaseError::fail));
        result.unwrap_or_else(|e| panic!("{dtype:?}: {e}"));
    }
}

/// Scales as words cost little beside what 8-bit activations do, even where single values are ten thousand times the others.
#[test]
fn words_for_scales_are_lost_in_the_rounding_of_activations() {
    let mut numbers = Numbers(17);
    for dtype in [Dtype::Q4_0, Dtype::Q4_1, Dtype::Q4_K] {
        let (rows, cols, tokens) = (64, 1536, 8);
        let data = stored_bytes(dtype, rows, cols, &mut numbers);
        let stored = Stored { dtype, rows, cols, data: &data };
        let weights = reference::weights(stored);
        let (mut by_words, mut by_rounding) = (0.0, 0.0);
        for _ in 0..tokens {
            let x = numbers.activations(cols);
            let exact: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
            let exact = reference::linear(&weights, &exact);
            let rounded = reference::linear(&weights, &reference::quantize_row(&x));
            for ((word, rounded), exact) in reference::linear_four(stored, &x).iter().zip(rounded).zip(exact) {
                by_words += (word.value - rounded.value).powi(2);
                by_rounding += (rounded.value - exact.value).powi(2);
            }
        }
        let share = (by_words / by_rounding).sqrt();
        println!("{}: {share:.4} of the rounding's error", dtype.name());
        assert!(share < 0.1, "{}: {share}", dtype.name());
    }
}

/// Whole numbers small enough that f32 never rounds: every layout must give the sum exactly, minimum's term included.
#[test]
fn whole_numbers_are_exact() {
    let exact =
        [Dtype::Q4_0, Dtype::Q4_1, Dtype::Q5_0, Dtype::Q8_0, Dtype::Q4_K, Dtype::IQ4_NL, Dtype::F32, Dtype::BF16];
    let (rows_count, cols, tokens) = (21, 256, 37);
    for dtype in exact {
        let mut numbers = Numbers(12);
        let mut data = stored_bytes(dtype, rows_count, cols, &mut numbers);
        for block in data.chunks_exact_mut(dtype.block_bytes()) {
            match dtype {
                Dtype::F32 => block.copy_from_slice(&(numbers.below(31) as f32 - 15.0).to_le_bytes()),
                Dtype::BF16 => {
                    block.copy_from_slice(&half::bf16::from_f32(numbers.below(31) as f32).to_le_bytes())
                }
                // Scales and minima of one.
                _ => scale_offsets(dtype).iter().for_each(|&at| block[at..at + 2].copy_from_slice(&[0, 0x3c])),
            }
        }
        // The largest of a group is 127 and its range 253, so its scale is one and its codes are the values.
        let value = |i: usize| match i % 32 {
            5 => 127.0,
            6 => -126.0,
            _ => numbers.below(17) as f32 - 8.0,
        };
        let x: Vec<f32> = (0..tokens * cols).map(value).collect();
        let stored = Stored { dtype, rows: rows_count, cols, data: &data };
        let weights = reference::weights(stored);
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let expected: Vec<f32> = x
            .chunks_exact(cols)
            .flat_map(|x| reference::linear(&weights, &wide(x)))
            .map(|sum| {
                assert!(sum.magnitude < f64::from(1 << 24), "the test's numbers are too large");
                sum.value as f32
            })
            .collect();
        for backend in backends().iter_mut().chain(&mut backends_with(RowDtype::Bf16)) {
            let layer = backend.load_linear(&[stored]).expect("sound weights");
            let input = rows(backend, &x, cols);
            let given = product(backend, &layer, &input);
            assert_eq!(difference(&given, &expected), None, "{dtype:?}, {}", describe(backend));
        }
    }
}

/// The largest codes against the largest activations: integer sums must not saturate or wrap.
#[test]
fn extreme_codes_do_not_saturate() {
    for backend in &mut backends() {
        for (dtype, byte, weight) in
            [(Dtype::Q8_0, 0x80_u8, -128.0), (Dtype::Q8_0, 0x7f, 127.0), (Dtype::Q4_1, 0xff, 15.0)]
        {
            let mut block = vec![byte; dtype.block_bytes()];
            block[..2].copy_from_slice(&0x3c00_u16.to_le_bytes());
            if dtype == Dtype::Q4_1 {
                block[2..4].fill(0);
            }
            let cols = 1024;
            let data = block.repeat(16 * cols / 32);
            let layer =
                backend.load_linear(&[Stored { dtype, rows: 16, cols, data: &data }]).expect("sound weights");
            for sign in [1.0, -1.0] {
                // Both forms have a scale of one.
                let group: Vec<f32> = (0..32).map(|i| if i < 28 { 127.0 * sign } else { -126.0 * sign }).collect();
                let x = rows(backend, &group.repeat(cols / 32), cols);
                let given = product(backend, &layer, &x);
                let expected = vec![group.iter().sum::<f32>() * weight * (cols / 32) as f32; 16];
                assert_eq!(given, expected, "{dtype:?} {byte:#x}, {}", describe(backend));
            }
        }
    }
}

/// Memory is reused from step to step: results must not remember an earlier, larger batch.
#[test]
fn reused_memory_changes_nothing() {
    let mut numbers = Numbers(5);
    let backend = &mut backends_with(RowDtype::Bf16).remove(1);
    let case = Case {
        parts: vec![(Dtype::Q4_1, 40), (Dtype::Q8_0, 18), (Dtype::F16, 24), (Dtype::BF16, 20)],
        cols: 96,
        tokens: 45,
        seed: 6,
    };
    let operands = case.operands();
    let layer = case.load(backend, &operands);
    assert_eq!(backend.form(&layer), ALL);
    let whole = rows(backend, &operands.x, 96);
    let expected = product(backend, &layer, &whole);
    let norm = backend.load_vector(&[1.0; 96]);
    let (mut x, mut out) = (Rows::default(), Matrix::default());
    for tokens in [45, 3, 17, 1, 30, 16, 45] {
        let ids: Vec<u32> = (0..tokens).map(|_| numbers.below(45) as u32).collect();
        let table = load_f32(backend, &operands.x, 96);
        let mut picked = Matrix::default();
        backend.embed(&table, &ids, 1.0, &mut picked);
        backend.rms_norm(&picked, None, &norm, 1e-5, (&mut x, ALL));
        backend.linear(&layer, &x, &mut out);
        let reused = backend.read(&out, 0..tokens);
        let mut fresh = (Rows::default(), Matrix::default());
        backend.rms_norm(&picked, None, &norm, 1e-5, (&mut fresh.0, ALL));
        backend.linear(&layer, &fresh.0, &mut fresh.1);
        assert_eq!(difference(&reused, &backend.read(&fresh.1, 0..tokens)), None);
    }
    assert_eq!(difference(&product(backend, &layer, &whole), &expected), None);
}

#[test]
fn no_rows_and_no_matrices_are_fine() {
    let backend = &mut backends().remove(1);
    let data = stored_bytes(Dtype::Q8_0, 20, 64, &mut Numbers(8));
    let layer = backend
        .load_linear(&[Stored { dtype: Dtype::Q8_0, rows: 20, cols: 64, data: &data }])
        .expect("sound weights");
    let none = rows(backend, &[], 64);
    assert!(product(backend, &layer, &none).is_empty());
    assert_eq!(backend.load_linear(&[]).expect("nothing").rows(), 0);
    let empty = Stored { dtype: Dtype::Q4_0, rows: 0, cols: 64, data: &[] };
    let layer = backend.load_linear(&[empty]).expect("no rows");
    assert_eq!((layer.rows(), layer.bytes()), (0, 0));
}

/// Four-bit weights stay four-bit: 16 bytes of codes and two words a group of 32, and two f32 a row.
#[test]
fn packed_sizes_are_what_the_layouts_say() {
    let backend = &mut backends().remove(0);
    let mut numbers = Numbers(9);
    for dtype in DTYPES {
        let data = stored_bytes(dtype, 32, 512, &mut numbers);
        let layer =
            backend.load_linear(&[Stored { dtype, rows: 32, cols: 512, data: &data }]).expect("sound weights");
        let bits = match dtype {
            Dtype::F32 => 32.0,
            Dtype::F16 | Dtype::BF16 => 16.0,
            // And two units a row.
            Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q4_K => 5.0 + 64.0 / 512.0,
            _ => 8.5,
        };
        assert_eq!(layer.bytes() as f64 * 8.0 / (32.0 * 512.0), bits, "{dtype:?}");
    }
}

/// A gated layer computed in one go gives the bits of its two halves, wherever the halves lie.
#[test]
fn gated_layers_are_their_parts() {
    use rill_kernels::Activation;
    let dtypes = [Dtype::Q4_1, Dtype::Q4_K, Dtype::Q6_K, Dtype::Q8_0, Dtype::F16, Dtype::BF16, Dtype::F32];
    for backend in &mut backends() {
        let mut numbers = Numbers(7);
        for (round, &dtype) in dtypes.iter().cycle().take(28).enumerate() {
            let width = [32, 160, 64, 48, 1536, 16, 256][round / 4];
            let tokens = [1, 3, 16, 37][round % 4];
            let other = if round % 5 == 0 { Dtype::Q8_0 } else { dtype };
            let parts =
                if round % 3 == 0 { vec![(dtype, 2 * width)] } else { vec![(dtype, width), (other, width)] };
            let case = Case { parts, cols: 256, tokens, seed: numbers.next() };
            let operands = case.operands();
            let layer = case.load(backend, &operands);
            let x = rows(backend, &operands.x, case.cols);
            for activation in [Activation::Silu, Activation::GeluTanh] {
                let (mut wide, mut scratch) = (Matrix::default(), Matrix::default());
                let (mut expected, mut given) = (Rows::default(), Rows::default());
                let form = if width % 32 == 0 { ALL } else { Form::F32.and(Form::BF16) };
                backend.linear(&layer, &x, &mut wide);
                backend.gated(activation, &wide, (&mut expected, form));
                backend.linear_gated(&layer, activation, &x, &mut scratch, (&mut given, form));
                let (given, expected) = (all_forms(backend, &given, width), all_forms(backend, &expected, width));
                assert_eq!(difference(&given, &expected), None, "{case:?}, {activation:?}, {}", describe(backend));
            }
        }
    }
}

/// What linear layers make of the f32 and bf16 forms and, where there are any, of the 8-bit forms.
fn all_forms(backend: &mut CpuBackend, x: &Rows, width: usize) -> Vec<f32> {
    let mut numbers = Numbers(3);
    let mut out = Vec::new();
    let dtypes = if width.is_multiple_of(32) {
        &[Dtype::F32, Dtype::BF16, Dtype::Q4_1, Dtype::Q8_0][..]
    } else {
        &[Dtype::F32, Dtype::BF16]
    };
    for &dtype in dtypes {
        let data = stored_bytes(dtype, 40, width, &mut numbers);
        let layer = backend.load_linear(&[Stored { dtype, rows: 40, cols: width, data: &data }]).expect("sound");
        out.extend(product(backend, &layer, x));
    }
    out
}
