//! Every kernel there is, and the most shared memory a launch of it asks for.

/// Bytes of a linear kernel's tile of sums.
const SMALL: usize = 512;
const LARGE: usize = 8 * SMALL;

/// Names as in kernels/cuda, and bytes of dynamic shared memory.
pub const KERNELS: [(&str, usize); 32] = [
    ("embed", 0),
    ("rms_norm", 32),
    ("layer_norm", 32),
    ("rms_norm_in_place", 32),
    ("activate", 0),
    ("to_rows", 0),
    ("add_bias", 0),
    ("add_scaled", 0),
    ("scatter_add", 0),
    ("linear_four_1x1", SMALL),
    ("linear_four_2x4", LARGE),
    ("linear_eight_1x1", SMALL),
    ("linear_eight_2x4", LARGE),
    ("linear_brain_1x1", SMALL),
    ("linear_brain_2x4", LARGE),
    ("linear_half_1x1", SMALL),
    ("linear_half_2x4", LARGE),
    ("linear_single_1x1", SMALL),
    ("linear_single_2x4", LARGE),
    ("rope_table", 0),
    ("rope_write", 0),
    ("merge_partitions", 0),
    ("attend_split_32", 30_720),
    ("attend_split_64", 55_296),
    ("attend_split_96", 79_872),
    ("attend_split_128", 52_224),
    ("attend_split_256", 101_376),
    ("attend_shared_32", 15_872),
    ("attend_shared_64", 30_208),
    ("attend_shared_96", 44_544),
    ("attend_shared_128", 58_880),
    ("attend_shared_256", 99_328),
];
