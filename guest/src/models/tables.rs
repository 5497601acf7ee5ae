//! Free pages of the table pool: CPUs that take and give back without a lock. A page's contents are
//! ordered by nothing but its bit.

use super::check;
use crate::sync::checked::{Op, Slip, plant};
use crate::tables::TablePages;
use core::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use loom::sync::Arc;
use loom::sync::atomic::AtomicU64;
use loom::thread;

/// The pool, and a word in each of its pages: 1 while a table is in use there.
struct Pool {
    pages: TablePages,
    words: [AtomicU64; 2],
}

impl Pool {
    /// Takes a page, uses it as a table, and gives it back; whether there was one.
    fn turn(&self) -> bool {
        let Some(page) = self.pages.take() else { return false };
        let word = &self.words[page as usize];
        assert_eq!(word.load(Relaxed), 0, "a page that is in use");
        word.store(1, Relaxed);
        word.store(0, Relaxed);
        self.pages.give(page);
        true
    }
}

/// Two CPUs take turns at once in a pool with this many free pages.
fn turns(free: u32) {
    check(Some(4), move || {
        let pool = Arc::new(Pool {
            pages: TablePages::new(),
            words: core::array::from_fn(|_| AtomicU64::new(0)),
        });
        pool.pages.add(0, free);
        let other = thread::spawn({
            let pool = pool.clone();
            move || pool.turn()
        });
        let served = [pool.turn(), other.join().unwrap()];
        let count = served.iter().filter(|served| **served).count();
        assert!(count >= free as usize, "a free page is not found");
        assert_eq!(pool.pages.taken(), 0, "pages that are still taken");
        let left = core::iter::from_fn(|| pool.pages.take()).count();
        assert_eq!(left, free as usize, "pages that are free");
    });
}

#[test]
fn a_page_has_one_user_and_is_found_again() {
    turns(1);
}

#[test]
fn with_a_page_for_each_cpu_both_find_one() {
    turns(2);
}

#[test]
#[should_panic(expected = "a page that is in use")]
fn twin_a_page_that_is_given_back_relaxed_is_still_in_use() {
    let _planted = plant(Slip::Relaxed(Op::Or, 64, Release));
    turns(1);
}

#[test]
#[should_panic(expected = "a page that is in use")]
fn twin_a_page_that_is_taken_relaxed_is_still_in_use() {
    let _planted = plant(Slip::Relaxed(Op::Exchange, 64, Acquire));
    turns(1);
}

#[test]
#[should_panic(expected = "is freed, but is free already")]
fn twin_a_page_that_is_taken_in_two_steps_has_two_users() {
    let _planted = plant(Slip::TwoSteps(Op::Exchange, 64));
    turns(1);
}
