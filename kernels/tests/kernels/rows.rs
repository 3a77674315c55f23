//! Row operations: embedding, norm, gated activation and quantisation.

use crate::inputs::{
    ALL, F32, Numbers, backends, describe, difference, identity, load_f32, matrix, product, read, rows,
    stored_bytes,
};
use rill_kernels::{
    Activation, Backend, ColumnRuns, CpuBackend, DTYPES, Dtype, Form, Linear, LogitFinish, Matrix, Rows, Stored,
    reference,
};

const Q8: Form = Form::Q8.and(Form::SHIFTED);
const FOUR: [Dtype; 3] = [Dtype::Q4_0, Dtype::Q4_1, Dtype::Q4_K];

/// The identity in 8-bit weights: reads the shifted form, each value scale · (q + shift).
fn identity_q8(backend: &mut CpuBackend, width: usize) -> Linear {
    let mut data = Vec::new();
    for row in 0..width {
        for group in 0..width / 32 {
            data.extend(0x3c00_u16.to_le_bytes());
            data.extend((0..32).map(|i| u8::from(group * 32 + i == row)));
        }
    }
    backend
        .load_linear(&[Stored { dtype: Dtype::Q8_0, rows: width, cols: width, data: &data }])
        .expect("sound weights")
}

/// The identity in 4-bit weights, in which code 8 is zero: reads the form about zero.
fn identity_q4(width: usize) -> Vec<u8> {
    let mut data = Vec::new();
    for row in 0..width {
        for group in 0..width / 32 {
            data.extend([0, 0x3c]);
            let code = |i: usize| 8 + u8::from(group * 32 + i == row);
            data.extend((0..16).map(|i| code(i) | code(i + 16) << 4));
        }
    }
    data
}

/// Rows whose values are all the same, read as that value whatever it is: the sum over 16 columns of 1/16.
fn read_constant(backend: &mut CpuBackend, x: &Rows, width: usize) -> Vec<f32> {
    let mean = load_f32(backend, &vec![1.0 / width as f32; width], width);
    product(backend, &mean, x)
}

fn close(given: &[f32], expected: &[f64], relative: f64, what: &str) {
    for (i, (&a, &b)) in given.iter().zip(expected).enumerate() {
        let error = (f64::from(a) - b).abs();
        assert!(error <= relative * b.abs() + 1e-35, "{what}, value {i}: {a:e}, not {b:e}");
    }
}

#[test]
fn quantised_rows_are_the_definitions() {
    for backend in &mut backends() {
        for (count, width) in [(1, 32), (15, 64), (16, 96), (17, 576), (70, 160)] {
            let mut numbers = Numbers(width as u64);
            let mut x = numbers.activations(count * width);
            // A group whose largest value is negative, and ties between codes.
            x[..32].copy_from_slice(&std::array::from_fn::<f32, 32, _>(|i| i as f32 * 0.5 - 127.0));
            let input = rows(backend, &x, width);
            let layer = identity_q8(backend, width);
            let given = product(backend, &layer, &input);
            let expected: Vec<f32> =
                x.chunks_exact(width).flat_map(reference::shift_row).map(|x| x as f32).collect();
            assert_eq!(given, expected, "{count} × {width}, {}", describe(backend));

            let data = identity_q4(width);
            let stored = Stored { dtype: Dtype::Q4_0, rows: width, cols: width, data: &data };
            let layer = backend.load_linear(&[stored]).expect("sound weights");
            let given = product(backend, &layer, &input);
            for (x, given) in x.chunks_exact(width).zip(given.chunks_exact(width)) {
                let (exact, sums) = (reference::quantize_row(x), reference::linear_four(stored, x));
                for (i, &given) in given.iter().enumerate() {
                    let (given, sum) = (f64::from(given), sums[i]);
                    assert!((given - sum.value).abs() <= 1e-6 * sum.magnitude, "{given:e}, not {sum:?}");
                    // A scale is kept to 2^-13 of the largest of eight groups, and so are both sides' product.
                    let span = &x[i / 256 * 256..(i / 256 * 256 + 256).min(width)];
                    let largest = span.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                    assert!(
                        (given - exact[i]).abs() <= f64::from(largest) / 4096.0,
                        "{given:e}, not {:e}",
                        exact[i]
                    );
                }
            }
            assert_eq!(read(backend, &input, width), x, "the f32 form, {}", describe(backend));
        }
    }
}

/// Values too small for 127 / amax to be finite count as zero, and disturb nobody: the quotient must not overflow.
#[test]
fn tiny_groups_become_zero() {
    for backend in &mut backends() {
        for tiny in [1e-45_f32, 1e-40, 1.2e-38, 3e-37] {
            let mut gate_up = vec![64.0_f32; 64];
            gate_up.extend((0..64).map(|i| if i < 32 { tiny * (i % 3) as f32 } else { i as f32 }));
            let gate_up = matrix(backend, &gate_up, 128);
            let mut x = Rows::default();
            // 64 · tiny stays below 3.7e-37 for all but the last, which is an ordinary small group.
            backend.silu_mul(&gate_up, (&mut x, ALL));
            let data = [&[0, 0x3c, 0, 0x3c][..], &[0x11; 16]].concat().repeat(2);
            let layer = backend
                .load_linear(&[Stored { dtype: Dtype::Q4_1, rows: 1, cols: 64, data: &data }])
                .expect("sound weights");
            let given = product(backend, &layer, &x)[0];
            // d = m = 1, all codes 1: twice the sum of 64 · (32..64).
            let expected = 2.0 * 64.0 * (32..64).sum::<i32>() as f32;
            assert!(
                (given / expected - 1.0).abs() < 0.01,
                "{tiny:e}: {given}, not {expected}, {}",
                describe(backend)
            );
        }
    }
}

#[test]
fn embedding_reads_the_stored_row() {
    let mut numbers = Numbers(3);
    for dtype in DTYPES {
        let (count, cols) = (45, 512);
        let data = stored_bytes(dtype, count, cols, &mut numbers);
        let stored = Stored { dtype, rows: count, cols, data: &data };
        let mut plain = vec![0.0; count * cols];
        rill_kernels::dequantize(dtype, &data, &mut plain);
        let packed = reference::weights(stored);
        let ids: Vec<u32> = [44, 0, 15, 16, 17, 31, 32, 0, 44].to_vec();
        for backend in &mut backends() {
            let table = backend.load_linear(&[stored]).expect("sound weights");
            let mut out = Matrix::default();
            for scale in [1.0, 24.0] {
                backend.embed(&table, &ids, scale, &mut out);
                let given = backend.read(&out, 0..ids.len());
                for (row, &id) in given.chunks_exact(cols).zip(&ids) {
                    let at = id as usize * cols;
                    // 4-bit grids are kept in words of 15 bits of the row's largest.
                    let most = packed[at..at + cols].iter().fold(0.0_f64, |m, x| m.max(x.magnitude)) as f32;
                    let off = if FOUR.contains(&dtype) { most * 2.0_f32.powi(-14) * scale } else { 0.0 };
                    for (i, &x) in row.iter().enumerate() {
                        let expected = packed[at + i].value as f32 * scale;
                        assert!((x - expected).abs() <= off, "{dtype:?} row {id} column {i}: {x}, not {expected}");
                        // What repacking may cost: half a step of an 8-bit grid, nothing where the grid is the type's.
                        let group = &plain[at + i / 32 * 32..][..32];
                        let amax = group.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                        let allowed = match dtype {
                            Dtype::Q2_K
                            | Dtype::Q3_K
                            | Dtype::Q5_K
                            | Dtype::Q6_K
                            | Dtype::Q5_1
                            | Dtype::IQ4_XS => amax / 250.0,
                            // Two roundings to f16 of terms that may cancel.
                            Dtype::Q4_K => packed[at + i].magnitude as f32 / 2048.0,
                            _ => 0.0,
                        };
                        let error = (packed[at + i].value as f32 - plain[at + i]).abs();
                        assert!(error <= allowed, "{dtype:?} row {id} column {i}: off by {error:e} of {amax:e}");
                    }
                }
            }
        }
    }
}

#[test]
fn rms_norm_is_its_definition_whoever_computes_it() {
    for (count, width) in [(1, 16), (3, 48), (5, 576), (33, 96), (4, 2048), (7, 50), (2, 5)] {
        let mut numbers = Numbers(width as u64);
        let x = numbers.activations(count * width);
        let weight: Vec<f32> = (0..width).map(|_| 1.0 + 0.3 * numbers.normal()).collect();
        let select: Vec<u32> = (0..count as u32).rev().chain([0, 0]).collect();
        let mut first: Option<Vec<f32>> = None;
        for backend in &mut backends() {
            let who = describe(backend);
            let input = matrix(backend, &x, width);
            let vector = backend.load_vector(&weight);
            let mut out = Rows::default();
            backend.rms_norm(&input, None, &vector, 1e-5, (&mut out, F32));
            let given = read(backend, &out, width);
            for (row, x) in given.chunks_exact(width).zip(x.chunks_exact(width)) {
                close(row, &reference::rms_norm(x, &weight, 1e-5), 2e-6, &who);
            }
            assert_eq!(difference(&given, first.get_or_insert(given.clone())), None, "{who}");
            backend.rms_norm(&input, Some(&select), &vector, 1e-5, (&mut out, F32));
            let selected = read(backend, &out, width);
            for (row, &source) in selected.chunks_exact(width).zip(&select) {
                assert_eq!(difference(row, &given[source as usize * width..][..width]), None, "{who}, selected");
            }
        }
    }
}

#[test]
fn rms_norm_of_extreme_rows() {
    let width = 32;
    let alternating: Vec<f32> = (0..width).map(|i| if i % 2 == 0 { 1e4 } else { -1e4 }).collect();
    let spike: Vec<f32> = (0..width).map(|i| if i == 7 { 1e18 } else { 1e-18 }).collect();
    let zeros: Vec<f32> = (0..width).map(|i| if i % 2 == 0 { 0.0 } else { -0.0 }).collect();
    for backend in &mut backends() {
        let vector = backend.load_vector(&vec![1.0; width]);
        let mut out = Rows::default();
        for x in [&alternating, &spike, &zeros] {
            let input = matrix(backend, x, width);
            backend.rms_norm(&input, None, &vector, 1e-5, (&mut out, ALL));
            close(&read(backend, &out, width), &reference::rms_norm(x, &vec![1.0; width], 1e-5), 2e-6, "extreme");
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            // One bad row among good ones: it is NaN, they are what they are alone.
            let mut x = alternating.repeat(6);
            x[2 * width..3 * width].fill(bad);
            let input = matrix(backend, &x, width);
            backend.rms_norm(&input, None, &vector, 1e-5, (&mut out, ALL));
            let given = read(backend, &out, width);
            for (row, values) in given.chunks_exact(width).enumerate() {
                assert_eq!(row == 2, values.iter().all(|x| x.is_nan()), "{bad}, row {row}, {}", describe(backend));
            }
        }
    }
}

#[test]
fn silu_mul_is_its_definition_whoever_computes_it() {
    for (count, width) in [(1, 16), (3, 48), (2, 1536), (40, 64)] {
        let mut numbers = Numbers(width as u64);
        let x: Vec<f32> = (0..count * 2 * width).map(|_| numbers.normal() * 8.0).collect();
        let mut first: Option<Vec<f32>> = None;
        for backend in &mut backends() {
            let who = describe(backend);
            let input = matrix(backend, &x, 2 * width);
            let mut out = Rows::default();
            backend.silu_mul(&input, (&mut out, F32));
            let given = read(backend, &out, width);
            for (row, x) in given.chunks_exact(width).zip(x.chunks_exact(2 * width)) {
                // The exponent x · log2 e is rounded to f32: half a unit in its last place, times ln 2, for |x| < 50.
                close(row, &reference::silu_mul(x), 5e-6, &who);
            }
            assert_eq!(difference(&given, first.get_or_insert(given.clone())), None, "{who}");
        }
    }
}

#[test]
fn silu_mul_of_extreme_values() {
    let width = 16;
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    // Gate, up, result.
    let cases = [
        (1e4, 1.0, 1e4),
        (1e4, -1e4, -1e8),
        (-1e4, 1.0, 0.0),
        (-1e4, 1e4, 0.0),
        (-88.0, 1.0, 0.0),
        (-200.0, 1.0, 0.0),
        (0.0, 5.0, 0.0),
        (-0.0, 5.0, 0.0),
        (1e30, 1e30, inf),
        (inf, 1.0, inf),
        (inf, -1.0, -inf),
        (1.0, inf, inf),
        (nan, 1.0, nan),
        (1.0, nan, nan),
        (nan, nan, nan),
        (0.0, inf, nan),
    ];
    for backend in &mut backends() {
        let row = |&(gate, up, _): &(f32, f32, f32)| [vec![gate; width], vec![up; width]].concat();
        let x: Vec<f32> = cases.iter().flat_map(row).collect();
        let input = matrix(backend, &x, 2 * width);
        let mut out = Rows::default();
        backend.silu_mul(&input, (&mut out, F32));
        let given = read_constant(backend, &out, width);
        for (&given, (gate, up, expected)) in given.iter().zip(cases) {
            let right = if expected.is_nan() {
                given.is_nan()
            } else {
                given == expected || (given - expected).abs() < 1e-25
            };
            assert!(right, "silu({gate}) · {up} is {given}, not {expected}, {}", describe(backend));
        }
        // Quantising infinities and NaN must not fault; their rows are garbage, their neighbours are not.
        let wide: Vec<f32> =
            (0..4).flat_map(|r| [vec![64.0; 32], vec![[1.0, nan, inf, 2.0][r]; 32]].concat()).collect();
        let input = matrix(backend, &wide, 64);
        backend.silu_mul(&input, (&mut out, Q8));
        let layer = identity_q8(backend, 32);
        let given = product(backend, &layer, &out);
        close(&given[..32], &[64.0; 32], 1e-6, "before");
        close(&given[96..], &[128.0; 32], 1e-6, "after");
    }
}

/// Norms and activations write the same 8-bit form, whichever made it.
#[test]
fn both_forms_agree() {
    for backend in &mut backends() {
        let (count, width) = (19, 128);
        let x = Numbers(11).activations(count * width);
        let input = matrix(backend, &x, width);
        let vector = backend.load_vector(&vec![0.7; width]);
        let mut out = Rows::default();
        backend.rms_norm(&input, None, &vector, 1e-6, (&mut out, ALL));
        let (plain, eight) = (identity(backend, width), identity_q8(backend, width));
        let plain = product(backend, &plain, &out);
        let given = product(backend, &eight, &out);
        let expected: Vec<f32> =
            plain.chunks_exact(width).flat_map(reference::shift_row).map(|x| x as f32).collect();
        assert_eq!(given, expected, "{}", describe(backend));
    }
}

const ACTIVATIONS: [Activation; 5] =
    [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Relu, Activation::ReluSquared];

#[test]
fn activations_are_their_definitions_gated_and_not() {
    for (count, width) in [(3, 48), (5, 50), (40, 64), (1, 7)] {
        let mut numbers = Numbers(width as u64 + 40);
        let x: Vec<f32> = (0..count * 2 * width).map(|_| numbers.normal() * 4.0).collect();
        for activation in ACTIVATIONS {
            let mut first: Option<Vec<f32>> = None;
            for backend in &mut backends() {
                let who = format!("{activation:?}, {}", describe(backend));
                let input = matrix(backend, &x, 2 * width);
                let mut out = Rows::default();
                backend.activate(activation, &input, (&mut out, F32));
                let mut given = read(backend, &out, 2 * width);
                // The approximated error function is right to 1.5e-7 of one, everything else to its own size.
                for (&y, &x) in given.iter().zip(&x) {
                    let expected = reference::activate(activation, f64::from(x));
                    let error = (f64::from(y) - expected).abs();
                    assert!(
                        error <= 5e-6 * expected.abs() + 4e-7 * f64::from(x.abs()),
                        "{who}: {x} → {y}, not {expected}"
                    );
                }
                backend.gated(activation, &input, (&mut out, F32));
                let gated = read(backend, &out, width);
                for (row, x) in gated.chunks_exact(width).zip(x.chunks_exact(2 * width)) {
                    for ((&y, expected), (&g, &u)) in
                        row.iter().zip(reference::gated(activation, x)).zip(x[..width].iter().zip(&x[width..]))
                    {
                        let error = (f64::from(y) - expected).abs();
                        let allowed = 5e-6 * expected.abs() + 4e-7 * f64::from((g * u).abs());
                        assert!(error <= allowed, "{who}: {g}, {u} → {y}, not {expected}");
                    }
                }
                given.extend(gated);
                assert_eq!(difference(&given, first.get_or_insert(given.clone())), None, "{who}");
            }
        }
    }
}

#[test]
fn layer_norm_is_its_definition_whoever_computes_it() {
    for (count, width) in [(1, 16), (3, 48), (33, 96), (7, 50), (2, 5)] {
        let mut numbers = Numbers(width as u64);
        let x: Vec<f32> = (0..count * width).map(|_| 3.0 + numbers.normal()).collect();
        let weight: Vec<f32> = (0..width).map(|_| 1.0 + 0.3 * numbers.normal()).collect();
        let bias: Vec<f32> = (0..width).map(|_| numbers.normal()).collect();
        let select: Vec<u32> = (0..count as u32).rev().collect();
        let mut first: Option<Vec<f32>> = None;
        for backend in &mut backends() {
            let who = describe(backend);
            let input = matrix(backend, &x, width);
            let (w, b) = (backend.load_vector(&weight), backend.load_vector(&bias));
            let mut out = Rows::default();
            backend.layer_norm(&input, Some(&select), (&w, Some(&b)), 1e-5, (&mut out, F32));
            let given = read(backend, &out, width);
            for (row, &source) in given.chunks_exact(width).zip(&select) {
                let x = &x[source as usize * width..][..width];
                for (&y, expected) in row.iter().zip(reference::layer_norm(x, &weight, &bias, 1e-5)) {
                    assert!((f64::from(y) - expected).abs() < 1e-5, "{who}: {y}, not {expected}");
                }
            }
            assert_eq!(difference(&given, first.get_or_insert(given.clone())), None, "{who}");
        }
    }
}

#[test]
fn in_place_operations_touch_their_part_alone() {
    let (count, width) = (9, 60);
    let mut numbers = Numbers(60);
    let x = numbers.activations(count * width);
    for backend in &mut backends() {
        let who = describe(backend);
        let weight: Vec<f32> = (0..20).map(|i| 1.0 + i as f32 / 10.0).collect();
        let vector = backend.load_vector(&weight);
        let mut input = matrix(backend, &x, width);
        backend.rms_norm_in_place(&mut input, 20..60, &vector, 1e-5);
        let given = backend.read(&input, 0..count);
        for (row, x) in given.chunks_exact(width).zip(x.chunks_exact(width)) {
            assert_eq!(difference(&row[..20], &x[..20]), None, "{who}");
            for part in [20..40, 40..60] {
                close(&row[part.clone()], &reference::rms_norm(&x[part], &weight, 1e-5), 2e-6, &who);
            }
        }
        let bias: Vec<f32> = (0..width).map(|i| i as f32).collect();
        let vector = backend.load_vector(&bias);
        let (mut a, b) = (matrix(backend, &x, width), matrix(backend, &x, width));
        backend.add_bias(&mut a, &vector);
        backend.add_scaled(&b, -0.5, &mut a);
        let expected: Vec<f32> = x.iter().enumerate().map(|(i, x)| (x + bias[i % width]) + -0.5 * x).collect();
        assert_eq!(backend.read(&a, 0..count), expected, "{who}");
        // Columns 5 and 6 to 10 and 11, 20 and 21, 30 and 31; then every second pair of columns together.
        let cases = [
            ColumnRuns { count: 3, width: 2, from: (5, 0), to: (10, 10) },
            ColumnRuns { count: 7, width: 2, from: (3, 4), to: (1, 2) },
        ];
        for runs in cases {
            let source = |run: usize| if runs.count == 3 { 5 } else { 3 + 4 * run };
            let mut expected = expected.clone();
            for row in 0..count {
                for run in 0..runs.count {
                    let to = row * width + runs.to.0 + run * runs.to.1;
                    expected[to..to + 2].copy_from_slice(&x[row * width + source(run)..][..2]);
                }
            }
            let mut a = matrix(backend, &backend.read(&a, 0..count), width);
            backend.copy_columns(&b, runs, &mut a);
            assert_eq!(backend.read(&a, 0..count), expected, "{who}");
        }
        backend.clear(&mut a, 4, width);
        assert_eq!(backend.read(&a, 0..4), vec![0.0; 4 * width]);
        let two = matrix(backend, &x[..2 * width], width);
        backend.scatter_add(&two, &[3, 1], &[2.0, 0.5], &mut a);
        let given = backend.read(&a, 0..4);
        let scaled =
            |row: usize, scale: f32| x[row * width..][..width].iter().map(|x| x * scale).collect::<Vec<f32>>();
        assert_eq!(given[3 * width..], scaled(0, 2.0), "{who}");
        assert_eq!(given[width..2 * width], scaled(1, 0.5), "{who}");
        assert!(given[..width].iter().chain(&given[2 * width..3 * width]).all(|&x| x == 0.0));
        let mut out = Rows::default();
        backend.to_rows(&b, None, (&mut out, F32));
        assert_eq!(difference(&read(backend, &out, width), &x), None, "{who}");
    }
}

#[test]
fn logits_are_scaled_and_capped() {
    let mut numbers = Numbers(61);
    let x: Vec<f32> = (0..40_003).map(|_| numbers.normal() * 60.0).chain([0.0, 1e30, -1e30]).collect();
    for backend in &mut backends() {
        let mut given = x.clone();
        backend.finish_logits(&mut given, LogitFinish { bias: None, scale: 0.5, softcap: Some(30.0) });
        for (&y, &x) in given.iter().zip(&x) {
            let expected = 30.0 * (f64::from(x) * 0.5 / 30.0).tanh();
            assert!((f64::from(y) - expected).abs() < 2e-5, "{x}: {y}, not {expected}, {}", describe(backend));
        }
        let mut given = x.clone();
        backend.finish_logits(&mut given, LogitFinish { bias: None, scale: 0.5, softcap: None });
        assert!(given.iter().zip(&x).all(|(y, x)| *y == x * 0.5));
    }
}
