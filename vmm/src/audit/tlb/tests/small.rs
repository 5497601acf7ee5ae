//! Every state of small worlds, walked breadth first: each step in model and reference, compared in
//! both directions. States that differ only by which CPU, page and frame, table or root is which are
//! one; of numbers only the order counts.

use super::canon::{Order, digest};
use super::world::{Op, Size, Slip, World};
use std::collections::HashSet;

/// What a walk found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Walk {
    pub states: usize,
    pub steps: usize,
}

/// A world and what happens in it.
#[derive(Clone)]
pub(super) struct Small {
    pub name: &'static str,
    pub size: Size,
    pub delayed: bool,
    pub ops: Vec<Op>,
}

fn orders(count: usize, all: bool) -> Vec<Vec<usize>> {
    let straight: Vec<usize> = (0..count).collect();
    let turned = straight.iter().rev().copied().collect();
    if all && count == 2 { vec![straight, turned] } else { vec![straight] }
}

impl Small {
    fn orders(&self) -> Vec<Order> {
        let Size { cpus, roots, tables, pages, .. } = self.size;
        // A CPU starts with the first root.
        let starts = self.ops.iter().any(|op| matches!(op, Op::Start(_)));
        let mut all = Vec::new();
        for cpus in orders(usize::from(cpus), true) {
            for pages in orders(pages, true) {
                for tables in orders(tables, true) {
                    for roots in orders(roots, !starts) {
                        let (cpus, pages, tables) = (cpus.clone(), pages.clone(), tables.clone());
                        all.push(Order { cpus, pages, tables, roots });
                    }
                }
            }
        }
        all
    }

    /// Walks every state, or up to the first in which model and reference disagree: how it came to
    /// it, and what they say.
    pub(super) fn walk(&self, slip: Slip) -> Result<Walk, String> {
        let orders = self.orders();
        let first = World::new(self.size, self.delayed, slip);
        let mut seen = HashSet::from([digest(&first, &orders)]);
        let mut came: Vec<(usize, Option<Op>)> = vec![(0, None)];
        let mut level = vec![(0, first)];
        let mut steps = 0;
        while !level.is_empty() {
            let mut next = Vec::new();
            for (id, world) in &level {
                for op in self.ops.iter().filter(|op| world.allows(**op)) {
                    let mut then = world.clone();
                    then.apply(*op);
                    steps += 1;
                    then.compare(true).map_err(|why| story(&came, *id, *op) + &why)?;
                    if seen.insert(digest(&then, &orders)) {
                        came.push((*id, Some(*op)));
                        next.push((came.len() - 1, then));
                    }
                }
            }
            level = next;
        }
        Ok(Walk { states: seen.len(), steps })
    }
}

fn story(came: &[(usize, Option<Op>)], mut id: usize, last: Op) -> String {
    let mut ops = vec![last];
    while let (before, Some(op)) = came[id] {
        ops.push(op);
        id = before;
    }
    ops.reverse();
    ops.iter().map(|op| format!("{op:?}\n")).collect()
}
