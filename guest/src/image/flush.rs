//! The program that times invalidations, for `lacuna bench flush`: a run of INVLPG, or one CR3
//! load, followed by loads that may have to walk the tables again.

use crate::cpu;
use crate::machine::Machine;
use lacuna_abi::addr::PAGE_SIZE;
use lacuna_guest::alloc::{PageAllocator, Request};
use lacuna_guest::freetype::Migratetype;
use lacuna_guest::mermap::Protection;
use lacuna_guest::platform::{InterruptsOff, Platform};
use lacuna_guest::programs::Services;

/// Pages of the window, half of which are invalidated and half looked at.
const ORDER: u8 = 8;

/// Times `rounds` rounds of `pages` INVLPGs, or a CR3 load where that is 0, and a load from each of
/// `touched` other pages, which every round has cached before. The least that a round took, in ticks of
/// the time-stamp counter, is what the program says as its progress: a round that the host
/// interrupts takes far longer.
pub(crate) fn run(
    allocator: &PageAllocator<'_, Machine>,
    machine: &Machine,
    [pages, touched, rounds]: [u64; 3],
) {
    let half = 1 << (ORDER - 1);
    assert!(pages <= half && touched <= half, "{pages} or {touched} pages are too many");
    let request =
        Request { order: ORDER, migratetype: Migratetype::Unmovable, zero: false, noblock: false };
    let memory = match allocator.alloc_mapped(request) {
        Ok(memory) => memory,
        Err(error) => panic!("no memory: {error:?}"),
    };
    let window = match allocator.mermap().get(memory.pin().frames(), Protection::READ) {
        Ok(window) => window,
        Err(error) => panic!("no window: {error:?}"),
    };
    let page = |number: u64| window.va().wrapping_add(number * PAGE_SIZE);
    let touch = || (half..half + touched).for_each(|number| _ = machine.load(page(number)));
    let mut least = u64::MAX;
    for _ in 0..rounds {
        let _off = InterruptsOff::new(machine);
        touch();
        let start = cpu::timestamp();
        if pages == 0 {
            cpu::flush_non_global();
        } else {
            (0..pages).for_each(|number| cpu::invalidate_page(page(number)));
        }
        touch();
        least = least.min(cpu::timestamp() - start);
    }
    machine.progress(least);
}
