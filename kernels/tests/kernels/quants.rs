//! Decoding of stored types against candle's, and against ggml's definition where candle has none.

use crate::inputs::{Numbers, scale_offsets, stored_bytes};
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use rill_kernels::{DTYPES, Dtype, dequantize};

fn candle(dtype: Dtype) -> Option<GgmlDType> {
    Some(match dtype {
        Dtype::F32 => GgmlDType::F32,
        Dtype::F16 => GgmlDType::F16,
        Dtype::BF16 => GgmlDType::BF16,
        Dtype::Q4_0 => GgmlDType::Q4_0,
        Dtype::Q4_1 => GgmlDType::Q4_1,
        Dtype::Q5_0 => GgmlDType::Q5_0,
        Dtype::Q5_1 => GgmlDType::Q5_1,
        Dtype::Q8_0 => GgmlDType::Q8_0,
        Dtype::Q2_K => GgmlDType::Q2K,
        Dtype::Q3_K => GgmlDType::Q3K,
        Dtype::Q4_K => GgmlDType::Q4K,
        Dtype::Q5_K => GgmlDType::Q5K,
        Dtype::Q6_K => GgmlDType::Q6K,
        Dtype::IQ4_NL | Dtype::IQ4_XS | Dtype::MXFP4 => return None,
    })
}

fn plain(tensor: &QTensor) -> Vec<f32> {
    let values = tensor.dequantize(&Device::Cpu).and_then(|t| t.flatten_all()).and_then(|t| t.to_vec1());
    values.expect("candle decodes its own tensor")
}

fn check(dtype: Dtype, data: &[u8], expected: &[f32], what: &str) {
    let mut given = vec![f32::NAN; expected.len()];
    dequantize(dtype, data, &mut given);
    for (i, (a, b)) in given.iter().zip(expected).enumerate() {
        // Equal, or one unit in the last place apart where candle contracts a product and a sum.
        let close = (a - b).abs() <= f32::EPSILON * b.abs();
        assert!(a == b || close, "{dtype:?}, {what}, value {i}: {a:e}, not {b:e}");
    }
}

#[test]
fn block_sizes_are_candles() {
    for dtype in DTYPES {
        if let Some(theirs) = candle(dtype) {
            assert_eq!(dtype.block_len(), theirs.block_size(), "{dtype:?}");
            assert_eq!(dtype.block_bytes(), theirs.type_size(), "{dtype:?}");
        }
        assert_eq!(Dtype::from_name(dtype.name()), Some(dtype));
        assert_eq!(dtype.row_bytes(512), Some(512 / dtype.block_len() * dtype.block_bytes()));
    }
    assert_eq!(Dtype::Q4_K.row_bytes(288), None);
    assert_eq!(Dtype::Q4_0.row_bytes(48), None);
    assert_eq!(Dtype::from_name("Q9_9"), None);
}

#[test]
fn quantised_normals_decode_as_candle_decodes_them() {
    let mut numbers = Numbers(1);
    for dtype in DTYPES {
        let Some(theirs) = candle(dtype) else { continue };
        let x: Vec<f32> = (0..16 * 256).map(|i| numbers.normal() * 0.1 * (1 + i / 256) as f32).collect();
        let tensor = Tensor::from_vec(x.clone(), (16, 256), &Device::Cpu).expect("a tensor");
        let tensor = QTensor::quantize(&tensor, theirs).expect("candle quantises it");
        let expected = plain(&tensor);
        check(dtype, &tensor.data().expect("its bytes"), &expected, "quantised");
        // And the comparison is worth something: what was decoded is what was stored.
        let error: f32 = x.iter().zip(&expected).map(|(a, b)| (a - b) * (a - b)).sum();
        let power: f32 = x.iter().map(|a| a * a).sum();
        assert!(error < 0.12 * power, "{dtype:?}: noise {error} on {power}");
    }
}

#[test]
fn random_bytes_decode_as_candle_decodes_them() {
    let mut numbers = Numbers(2);
    for dtype in DTYPES {
        let Some(theirs) = candle(dtype) else { continue };
        let data = stored_bytes(dtype, 64, 256, &mut numbers);
        let tensor =
            qtensor_from_ggml(theirs, &data, vec![64, 256], &Device::Cpu).expect("candle takes the bytes");
        check(dtype, &data, &plain(&tensor), "random bytes");
    }
}

/// ggml's `kvalues_iq4nl`, written down again on purpose.
const TABLE: [f32; 16] =
    [-127., -104., -83., -65., -49., -35., -22., -10., 1., 13., 25., 38., 53., 69., 89., 113.];

#[test]
fn iq4_nl_is_ggmls_table() {
    // d = 0.5; byte j holds code j low and code 15 - j high: values 0..16 of the block, then 16..32.
    let mut block = 0x3800_u16.to_le_bytes().to_vec();
    block.extend((0..16_u8).map(|j| j | ((15 - j) << 4)));
    let expected: Vec<f32> = TABLE.iter().chain(TABLE.iter().rev()).map(|x| 0.5 * x).collect();
    check(Dtype::IQ4_NL, &block, &expected, "by hand");
}

#[test]
fn iq4_xs_is_ggmls_definition() {
    // Six-bit scales by hand: low nibbles of groups 0..8 in four bytes, high pairs in sixteen bits.
    let scales = [0_u8, 63, 32, 33, 31, 17, 48, 5];
    let mut block = 0x3c00_u16.to_le_bytes().to_vec();
    let high = scales.iter().enumerate().fold(0_u16, |h, (g, s)| h | (u16::from(s >> 4) << (2 * g)));
    block.extend(high.to_le_bytes());
    block.extend(scales.chunks(2).map(|two| (two[0] & 15) | ((two[1] & 15) << 4)));
    for group in 0..8_u8 {
        block.extend((0..16_u8).map(|j| ((j + group) & 15) | (((15 - j) ^ group) << 4)));
    }
    let mut expected = Vec::new();
    for (group, &scale) in scales.iter().enumerate() {
        let d = f32::from(scale) - 32.0;
        expected.extend((0..16).map(|j| d * TABLE[(j + group) & 15]));
        expected.extend((0..16).map(|j| d * TABLE[(15 - j) ^ group]));
    }
    assert_eq!(block.len(), Dtype::IQ4_XS.block_bytes());
    check(Dtype::IQ4_XS, &block, &expected, "by hand");
}

#[test]
fn mxfp4_is_the_specifications_table() {
    // E8M0 exponents, whose bias is 127, and E2M1 values: code j low and code 15 - j high.
    let values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
    for exponent in [0_u8, 1, 100, 127, 130, 252] {
        let mut block = vec![exponent];
        block.extend((0..16_u8).map(|j| j | ((15 - j) << 4)));
        let scale = 2_f64.powi(i32::from(exponent) - 127);
        let expected: Vec<f32> = values.iter().chain(values.iter().rev()).map(|x| (scale * *x) as f32).collect();
        check(Dtype::MXFP4, &block, &expected, "by hand");
    }
}

#[test]
fn every_quantised_type_has_a_scale() {
    for dtype in DTYPES {
        let without = dtype.block_len() == 1 || dtype == Dtype::MXFP4;
        assert_eq!(scale_offsets(dtype).is_empty(), without, "{dtype:?}");
    }
}
