//! rill as a library: what the binary and the tests share.
