//! What the crate refuses: packing errors by value, misuse by panics that say what is wrong.

use crate::inputs::{ALL, F32, Numbers, isas, load_f32, matrix, rows, stored_bytes};
use rill_kernels::{
    AttentionShape, Backend, CacheShape, ColumnRuns, CpuBackend, DTYPES, Dtype, Matrix, PackError, Rope, Rows,
    Step, StepInput, Stored,
};
use std::panic::{AssertUnwindSafe, catch_unwind};

fn backend() -> CpuBackend {
    CpuBackend::new(2, isas()[0])
}

/// The message `f` panics with.
fn panics(f: impl FnOnce()) -> String {
    let Err(payload) = catch_unwind(AssertUnwindSafe(f)) else { panic!("nothing was refused") };
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|s| s.to_string())).expect("a message")
}

#[test]
fn wrong_sizes_are_errors_that_name_both() {
    let backend = &mut backend();
    for dtype in DTYPES {
        let data = stored_bytes(dtype, 3, 256, &mut Numbers(1));
        for given in [0, data.len() - 1, data.len() / 3, data.len() + 1] {
            let long = [&data[..], &[0]].concat();
            let stored = Stored { dtype, rows: 3, cols: 256, data: &long[..given] };
            let expected = PackError::Size { rows: 3, cols: 256, dtype: dtype.name(), needed: data.len(), given };
            let Err(error) = backend.load_linear(&[stored]) else { panic!("{dtype:?} with {given} bytes") };
            let text = error.to_string();
            assert_eq!(error, expected);
            assert!(text.contains(&data.len().to_string()) && text.contains(dtype.name()), "{text}");
        }
    }
}

#[test]
fn broken_blocks_are_errors() {
    let backend = &mut backend();
    for dtype in DTYPES {
        let multiple = dtype.block_len();
        for cols in [multiple - 1, multiple + multiple / 2] {
            if cols.is_multiple_of(multiple) {
                continue;
            }
            let stored = Stored { dtype, rows: 1, cols, data: &[0; 1024] };
            let expected = PackError::Columns { cols, multiple, dtype: dtype.name() };
            assert_eq!(backend.load_linear(&[stored]).err(), Some(expected));
        }
    }
}

#[test]
fn sizes_beyond_the_address_space_are_errors() {
    let backend = &mut backend();
    for (rows, cols) in [(usize::MAX, 256), (1 << 40, 1 << 40), (1, 1 << 62), (3, 1 << 63)] {
        for dtype in DTYPES {
            let stored = Stored { dtype, rows, cols, data: &[0; 34] };
            assert!(backend.load_linear(&[stored]).is_err(), "{rows} × {cols} {dtype:?}");
        }
    }
}

#[test]
fn parts_of_different_width_are_an_error() {
    let backend = &mut backend();
    let (a, b) = (vec![0; 34 * 2], vec![0; 34 * 3]);
    let parts = [
        Stored { dtype: Dtype::Q8_0, rows: 1, cols: 64, data: &a },
        Stored { dtype: Dtype::Q8_0, rows: 1, cols: 96, data: &b },
    ];
    assert_eq!(backend.load_linear(&parts).err(), Some(PackError::Mixed { first: 64, other: 96 }));
}

#[test]
fn misused_linear_layers_panic() {
    let backend = &mut backend();
    let table = load_f32(backend, &[1.0; 4 * 64], 64);
    let mut out = Matrix::default();
    assert!(panics(|| backend.embed(&table, &[3, 4], 1.0, &mut out)).contains("token id"));

    let x = matrix(backend, &[1.0; 2 * 64], 64);
    let (narrow, vector) = (backend.load_vector(&[1.0; 32]), backend.load_vector(&[1.0; 64]));
    let mut row = Rows::default();
    assert!(panics(|| backend.rms_norm(&x, None, &narrow, 1e-5, (&mut row, F32))).contains("weight"));
    assert!(panics(|| backend.rms_norm(&x, Some(&[2]), &vector, 1e-5, (&mut row, F32))).contains("row"));

    let data = stored_bytes(Dtype::Q4_0, 8, 64, &mut Numbers(2));
    let quantised = Stored { dtype: Dtype::Q4_0, rows: 8, cols: 64, data: &data };
    let quantised = backend.load_linear(&[quantised]).expect("sound weights");
    backend.rms_norm(&x, None, &vector, 1e-5, (&mut row, F32));
    assert!(panics(|| backend.linear(&quantised, &row, &mut out)).contains("form"));
    let wide = rows(backend, &[1.0; 96], 96);
    assert!(panics(|| backend.linear(&quantised, &wide, &mut out)).contains("form"));
    backend.rms_norm(&x, None, &vector, 1e-5, (&mut row, ALL));
    let mut other = matrix(backend, &[0.0; 3 * 8], 8);
    assert!(panics(|| backend.linear_add(&quantised, &row, &mut other)).contains("shape"));
    let odd = matrix(backend, &[0.0; 33], 33);
    assert!(panics(|| backend.silu_mul(&odd, (&mut row, F32))).contains("gate"));
    // And nothing is broken afterwards.
    backend.rms_norm(&x, None, &vector, 1e-5, (&mut row, ALL));
    backend.linear(&quantised, &row, &mut out);
    assert_eq!(backend.read(&out, 0..2).len(), 16);
}

#[test]
fn misused_attention_panics() {
    let backend = &mut backend();
    let heads = AttentionShape::full(2, 1, 32, 0.2);
    let shape = CacheShape { blocks: 2, block_size: 16 };
    let rope = Rope { inverse_frequencies: vec![1.0; 4], factor: 1.0 };
    let qkv = matrix(backend, &[0.5; 2 * 128], 128);
    let (mut step, mut out) = (Step::default(), Rows::default());
    let good = StepInput {
        positions: &[0, 1],
        slot_mapping: &[16, 17],
        query_starts: &[0, 2],
        context_lens: &[2],
        block_tables: &[1],
        block_table_starts: &[0, 1],
    };
    let mut cache = backend.new_kv_cache(shape, heads);
    backend.prepare(good, &rope, heads, &mut step);
    backend.attention(&qkv, heads, good, &mut step, &mut cache, (&mut out, ALL));

    let bad = StepInput { slot_mapping: &[16, 32], ..good };
    assert!(
        panics(|| backend.attention(&qkv, heads, bad, &mut step, &mut cache, (&mut out, ALL))).contains("slot")
    );
    let bad = StepInput { block_tables: &[2], ..good };
    assert!(
        panics(|| backend.attention(&qkv, heads, bad, &mut step, &mut cache, (&mut out, ALL))).contains("block")
    );
    let other = AttentionShape { heads: 1, kv_heads: 2, ..heads };
    assert!(
        panics(|| backend.attention(&qkv, other, good, &mut step, &mut cache, (&mut out, ALL))).contains("cache")
    );
    let narrow = matrix(backend, &[0.5; 2 * 96], 96);
    assert!(
        panics(|| backend.attention(&narrow, heads, good, &mut step, &mut cache, (&mut out, ALL)))
            .contains("shape")
    );
    let odd = AttentionShape { head_dim: 288, ..heads };
    let mut odd_cache = backend.new_kv_cache(shape, odd);
    assert!(
        panics(|| backend.attention(&qkv, odd, good, &mut step, &mut odd_cache, (&mut out, ALL))).contains("288")
    );
    let mut unprepared = Step::default();
    let message = panics(|| backend.attention(&qkv, heads, good, &mut unprepared, &mut cache, (&mut out, ALL)));
    assert!(message.contains("prepared"));
    // A block table shorter than its sequence.
    let bad = StepInput { positions: &[16, 17], context_lens: &[18], ..good };
    backend.prepare(bad, &rope, heads, &mut step);
    panics(|| backend.attention(&qkv, heads, bad, &mut step, &mut cache, (&mut out, ALL)));
    // A step prepared for other rows or other heads.
    let one =
        StepInput { positions: &[0], slot_mapping: &[16], query_starts: &[0, 1], context_lens: &[1], ..good };
    for (input, heads) in [(one, heads), (good, AttentionShape { scale: 0.3, ..heads })] {
        backend.prepare(input, &rope, heads, &mut step);
        let heads = AttentionShape { scale: 0.2, ..heads };
        let message = panics(|| backend.attention(&qkv, heads, good, &mut step, &mut cache, (&mut out, ALL)));
        assert!(message.contains("prepared"), "{message}");
    }
    // Values wider than keys, and columns beyond a matrix or on top of each other.
    let wide = AttentionShape { value_dim: 64, ..heads };
    let wide_qkv = matrix(backend, &[0.5; 2 * 160], 160);
    assert!(
        panics(|| backend.attention(&wide_qkv, wide, good, &mut step, &mut cache, (&mut out, ALL)))
            .contains("values of 64")
    );
    let mut target = matrix(backend, &[0.5; 2 * 8], 8);
    for (count, from, to) in [(2, (0, 125), (0, 4)), (3, (0, 0), (0, 3)), (2, (0, 4), (0, 3))] {
        let runs = ColumnRuns { count, width: 4, from, to };
        assert!(panics(|| backend.copy_columns(&qkv, runs, &mut target)).contains("columns beyond"));
    }
    // More dimensions to turn than a head has, heads that do not divide.
    let long = Rope { inverse_frequencies: vec![1.0; 17], factor: 1.0 };
    assert!(panics(|| backend.prepare(good, &long, heads, &mut step)).contains("17"));
    for (heads, kv_heads) in [(3, 2), (1, 2), (2, 0)] {
        let heads = AttentionShape::full(heads, kv_heads, 32, 1.0);
        assert!(panics(|| backend.prepare(good, &rope, heads, &mut step)).contains("heads"));
    }
    panics(|| drop(backend.new_kv_cache(CacheShape { blocks: 2, block_size: 24 }, heads)));
}

#[test]
fn unavailable_instructions_are_refused() {
    for isa in rill_kernels::Isa::ALL {
        if isa.available() {
            assert_eq!(CpuBackend::new(1, isa).isa(), isa);
        } else {
            assert!(panics(|| drop(CpuBackend::new(1, isa))).contains(isa.name()));
        }
    }
    assert!(rill_kernels::Isa::detect().available());
}
