//! Which linear layer comes after which, learnt from the steps there have been, and where each thread begins to read it:
//! what threads that wait can ask memory for.

use crate::pool::{Ahead, Pool};

/// The linear layers of a backend, in the order they were loaded.
#[derive(Default)]
pub(super) struct Order {
    layers: Vec<Place>,
    last: Option<usize>,
}

#[derive(Default)]
struct Place {
    /// What came after it the last time.
    next: Option<usize>,
    /// Rows it met then.
    rows: usize,
    /// Where each thread begins.
    begins: Vec<Ahead>,
}

impl Order {
    /// The number of one more layer.
    pub(super) fn add(&mut self) -> usize {
        self.layers.push(Place::default());
        self.layers.len() - 1
    }

    /// Layer `number` is about to meet `rows` rows, and thread `t` of the pool begins at `begin(t)`. Layers that another backend
    /// loaded may have any number: what is known of them is a hint as well.
    pub(super) fn enter(&mut self, number: usize, rows: usize, pool: &mut Pool, begin: impl Fn(usize) -> Ahead) {
        if number >= self.layers.len() {
            self.layers.resize_with(number + 1, Place::default);
        }
        if let Some(last) = self.last.replace(number) {
            self.layers[last].next = Some(number);
        }
        let layer = &mut self.layers[number];
        if layer.rows != rows {
            layer.rows = rows;
            layer.begins.clear();
            layer.begins.extend((0..pool.threads()).map(begin));
        }
        if let Some(next) = layer.next {
            pool.expect(&self.layers[next].begins);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Order;
    use crate::pool::{Ahead, Pool};

    #[test]
    fn what_came_after_a_layer_is_expected_after_it_again() {
        let (mut order, mut pool) = (Order::default(), Pool::new(2));
        let layers = [order.add(), order.add(), order.add()];
        let at = |layer: usize, thread: usize| Ahead { runs: [(layer * 1000 + thread, 0); 4], steps: 1 };
        for _ in 0..2 {
            for layer in layers {
                order.enter(layer, 1, &mut pool, |thread| at(layer, thread));
            }
        }
        for thread in 0..2 {
            assert_eq!(pool.expected(thread), at(0, thread), "the first layer comes after the last");
        }
        order.enter(0, 1, &mut pool, |thread| at(0, thread));
        assert_eq!(pool.expected(1), at(1, 1));
        // Another number of rows is shared out otherwise.
        order.enter(1, 5, &mut pool, |thread| at(7, thread));
        order.enter(0, 5, &mut pool, |thread| at(0, thread));
        assert_eq!(pool.expected(1), at(7, 1));
    }
}
