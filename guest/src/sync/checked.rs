//! Atomics that loom follows, with slips that can be planted: an operation that is ordered less
//! than the code asks for, or a read-modify-write that is not one.
//!
//! So a model's twin runs the very code that the model runs, and differs in one slip. A slip holds
//! for the thread of the test that plants it: loom runs all threads of a model on that one.

#![allow(dead_code, reason = "each width has every operation, and only models plant slips")]

use core::cell::Cell;
use core::sync::atomic::Ordering::{self, Relaxed};
use loom::sync::atomic;
use std::thread_local;

/// An operation on an atomic.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    Load,
    Store,
    Add,
    Sub,
    And,
    Or,
    Exchange,
    Swap,
    Update,
}

/// What goes wrong with every operation of a kind on atomics of one width in bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Slip {
    /// Those with this ordering are relaxed.
    Relaxed(Op, u32, Ordering),
    /// A compare-and-exchange, a swap, an update, or an AND loads and stores in two steps.
    TwoSteps(Op, u32),
}

thread_local! {
    static SLIP: Cell<Option<Slip>> = const { Cell::new(None) };
}

/// A slip is planted while this lives.
#[must_use = "the slip is gone when this is dropped"]
pub(crate) struct Planted;

/// Plants a slip.
pub(crate) fn plant(slip: Slip) -> Planted {
    SLIP.set(Some(slip));
    Planted
}

impl Drop for Planted {
    fn drop(&mut self) {
        SLIP.set(None);
    }
}

fn order(op: Op, bits: u32, asked: Ordering) -> Ordering {
    if SLIP.get() == Some(Slip::Relaxed(op, bits, asked)) { Relaxed } else { asked }
}

fn in_two_steps(op: Op, bits: u32) -> bool {
    SLIP.get() == Some(Slip::TwoSteps(op, bits))
}

macro_rules! atomic {
    ($name:ident, $value:ty, $bits:literal) => {
        #[derive(Debug, Default)]
        pub struct $name(atomic::$name);

        impl $name {
            pub(crate) fn new(value: $value) -> Self {
                Self(atomic::$name::new(value))
            }

            pub(crate) fn load(&self, asked: Ordering) -> $value {
                self.0.load(order(Op::Load, $bits, asked))
            }

            pub(crate) fn store(&self, value: $value, asked: Ordering) {
                self.0.store(value, order(Op::Store, $bits, asked));
            }

            pub(crate) fn compare_exchange(
                &self,
                current: $value,
                new: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                if in_two_steps(Op::Exchange, $bits) {
                    let found = self.0.load(failure);
                    if found != current {
                        return Err(found);
                    }
                    self.0.store(new, Relaxed);
                    return Ok(found);
                }
                let success = order(Op::Exchange, $bits, success);
                self.0.compare_exchange(current, new, success, failure)
            }

            pub(crate) fn swap(&self, value: $value, asked: Ordering) -> $value {
                if in_two_steps(Op::Swap, $bits) {
                    let found = self.0.load(Ordering::Acquire);
                    self.0.store(value, Relaxed);
                    return found;
                }
                self.0.swap(value, order(Op::Swap, $bits, asked))
            }

            pub(crate) fn fetch_and(&self, value: $value, asked: Ordering) -> $value {
                if in_two_steps(Op::And, $bits) {
                    let found = self.0.load(Relaxed);
                    self.0.store(found & value, Ordering::Release);
                    return found;
                }
                self.0.fetch_and(value, order(Op::And, $bits, asked))
            }

            pub(crate) fn fetch_or(&self, value: $value, asked: Ordering) -> $value {
                self.0.fetch_or(value, order(Op::Or, $bits, asked))
            }
        }
    };
}

macro_rules! number {
    ($name:ident, $value:ty, $bits:literal) => {
        impl $name {
            pub(crate) fn fetch_add(&self, value: $value, asked: Ordering) -> $value {
                self.0.fetch_add(value, order(Op::Add, $bits, asked))
            }

            pub(crate) fn fetch_sub(&self, value: $value, asked: Ordering) -> $value {
                self.0.fetch_sub(value, order(Op::Sub, $bits, asked))
            }

            pub(crate) fn fetch_update(
                &self,
                set: Ordering,
                fetch: Ordering,
                mut update: impl FnMut($value) -> Option<$value>,
            ) -> Result<$value, $value> {
                if in_two_steps(Op::Update, $bits) {
                    let found = self.0.load(fetch);
                    let new = update(found).ok_or(found)?;
                    self.0.store(new, Relaxed);
                    return Ok(found);
                }
                self.0.fetch_update(order(Op::Update, $bits, set), fetch, update)
            }
        }
    };
}

atomic!(AtomicBool, bool, 1);
atomic!(AtomicU8, u8, 8);
atomic!(AtomicU32, u32, 32);
atomic!(AtomicU64, u64, 64);
number!(AtomicU8, u8, 8);
number!(AtomicU32, u32, 32);
number!(AtomicU64, u64, 64);

pub(crate) use loom::sync::MutexGuard;

/// A mutex that is only tried: who waits for it says how.
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(loom::sync::Mutex::new(value))
    }

    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock().ok()
    }
}
