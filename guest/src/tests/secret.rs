//! Owning types: what reaches the bytes of a secret page, and what does not.

use crate::alloc::PageAllocator;
use crate::handle::BadHandle;
use crate::mapped::{MappedPages, PinnedPages};
use crate::mermap::{Mapping, Protection};
use crate::platform::{InterruptsOff, Platform};
use crate::secret::{Access, SecretPages, SecretWindow, UseError};
use crate::testing::{Mock, Seen, pages, zero_pages};
use lacuna_abi::addr::{FrameRange, PAGE_SIZE};
use lacuna_abi::event::Life;
use lacuna_abi::gate::OpKind;
use lacuna_abi::layout::SCRATCH;
use std::vec::Vec;

#[test]
fn owners_cannot_be_copied_nor_dereferenced() {
    assert_owned!(
        SecretPages<'static, 'static, Mock>,
        SecretWindow<'static, 'static, Mock>,
        MappedPages<'static, 'static, Mock>,
        PinnedPages<'static, 'static, Mock>,
        Mapping<'static, 'static, Mock>
    );
}

#[test]
fn guards_of_a_cpu_stay_on_it() {
    assert_stays!(
        InterruptsOff<'static, Mock>,
        Mapping<'static, 'static, Mock>,
        SecretWindow<'static, 'static, Mock>
    );
    // Owners are for any CPU.
    fn sent<T: Send>() {}
    sent::<SecretPages<'_, '_, Mock>>();
    sent::<MappedPages<'_, '_, Mock>>();
}

#[test]
fn the_allocator_is_shared_by_cpus() {
    fn shared<T: Sync>() {}
    shared::<PageAllocator<'_, Mock>>();
}

#[test]
fn what_is_stored_in_a_window_is_there_in_the_next_one() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(zero_pages(2)).unwrap();
    let window = secret.open(1, 2, Access::Write).unwrap();
    window.store(PAGE_SIZE, 42).unwrap();
    assert_eq!(window.load(PAGE_SIZE), Ok(42));
    window.close().unwrap();
    let window = secret.open(2, 1, Access::Read).unwrap();
    assert_eq!((window.load(0), window.load(8)), (Ok(42), Ok(0)));
}

#[test]
fn words_outside_the_window_or_across_words_are_refused() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(zero_pages(1)).unwrap();
    let window = secret.open(0, 1, Access::Write).unwrap();
    for offset in [PAGE_SIZE, PAGE_SIZE - 4, 4, u64::MAX - 7, u64::MAX] {
        assert_eq!(window.load(offset), Err(UseError::OutOfRange), "{offset:#x}");
        assert_eq!(window.store(offset, 1), Err(UseError::OutOfRange), "{offset:#x}");
    }
    assert_eq!(window.copy_from(SCRATCH, 8, PAGE_SIZE), Err(UseError::OutOfRange));
    assert_eq!(window.copy_from(SCRATCH, 0, u64::MAX - 7), Err(UseError::OutOfRange));
    assert_eq!(window.equals(SCRATCH, 16, PAGE_SIZE - 8), Err(UseError::OutOfRange));
    assert_eq!(window.load(PAGE_SIZE - 8), Ok(0));
}

#[test]
fn pages_outside_the_allocation_are_not_opened() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(pages(1)).unwrap();
    mock.seen();
    for (first, count) in [(0, 3), (2, 1), (1, 2), (0, 0), (u64::MAX, 1), (1, u64::MAX)] {
        let error = secret.open(first, count, Access::Read).err();
        assert_eq!(error, Some(UseError::OutOfRange), "{first}, {count}");
    }
    assert_eq!(mock.seen(), []);
}

#[test]
fn a_window_for_reading_refuses_stores() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(zero_pages(0)).unwrap();
    let window = secret.open(0, 1, Access::Read).unwrap();
    assert_eq!(window.store(0, 1), Err(UseError::ReadOnly));
    assert_eq!(window.zero(), Err(UseError::ReadOnly));
    assert_eq!(window.copy_from(SCRATCH, 0, 8), Err(UseError::ReadOnly));
    window.close().unwrap();
    assert!(mock.map().is_known(secret.frames()), "reading leaves pages known to be zero");
}

#[test]
fn bytes_are_copied_compared_and_zeroed() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(zero_pages(0)).unwrap();
    mock.store(SCRATCH, 1);
    mock.store(SCRATCH.wrapping_add(8), 2);
    let window = secret.open(0, 1, Access::Write).unwrap();
    window.copy_from(SCRATCH, 24, 16).unwrap();
    assert_eq!(window.equals(SCRATCH, 24, 16), Ok(true));
    assert_eq!(window.equals(SCRATCH, 16, 16), Ok(false));
    mock.store(SCRATCH.wrapping_add(8), 3);
    assert_eq!(window.equals(SCRATCH, 24, 16), Ok(false));
    window.zero().unwrap();
    assert_eq!(window.load(24), Ok(0));
}

#[test]
fn one_page_is_opened_through_the_reserve_when_all_slots_are_taken() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(zero_pages(1)).unwrap();
    let other = FrameRange::single(mock.layout.zone.end().frame().wrapping_add(u64::MAX));
    let _slots: Vec<_> =
        (0..4).map(|_| allocator.mermap().get(other, Protection::READ).unwrap()).collect();
    mock.seen();
    assert!(matches!(secret.open(0, 2, Access::Read).err(), Some(UseError::Window(_))));
    let frames = secret.frames();
    let gates = [Seen::Gate(OpKind::Open, frames), Seen::Gate(OpKind::Seal, frames)];
    assert_eq!(mock.seen(), gates, "what cannot be mapped is sealed again");
    let window = secret.open(1, 1, Access::Write).unwrap();
    window.store(0, 5).unwrap();
    assert_eq!(window.load(0), Ok(5));
    drop(window);
    assert_eq!(allocator.counters().windows_reserved, 1);
}

#[test]
fn freed_pages_are_scrubbed_and_reported_in_this_order() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(pages(0)).unwrap();
    let frames = secret.frames();
    let window = secret.open(0, 1, Access::Write).unwrap();
    window.store(8, 0xdead).unwrap();
    window.close().unwrap();
    mock.seen();
    drop(secret);
    allocator.drain_all().unwrap();
    let seen = mock.seen();
    let place = |wanted| seen.iter().position(|s| *s == wanted).unwrap();
    let steps = [
        place(Seen::Life(Life::Freed, frames)),
        place(Seen::Gate(OpKind::Open, frames)),
        place(Seen::Zero(frames)),
        place(Seen::Gate(OpKind::Seal, frames)),
        place(Seen::Life(Life::PooledZero, frames)),
    ];
    assert!(steps.is_sorted(), "{seen:?}");
    assert!(mock.state().frame(frames.start()).contents.is_zero());
}

#[test]
fn an_untouched_zero_page_is_freed_by_one_record_and_no_gate_call() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(zero_pages(3)).unwrap();
    let frames = secret.frames();
    mock.seen();
    drop(secret);
    assert_eq!(mock.seen(), [Seen::Life(Life::PooledZero, frames)]);
}

#[test]
fn a_handle_leads_back_once_and_to_its_own_kind_only() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(pages(2)).unwrap();
    let frames = secret.frames();
    let handle = secret.into_raw();
    assert_ne!(handle, 0);
    assert_eq!(MappedPages::from_raw(&allocator, handle).err(), Some(BadHandle(handle)));
    let secret = SecretPages::from_raw(&allocator, handle).unwrap();
    assert_eq!(secret.frames(), frames);
    assert_eq!(SecretPages::from_raw(&allocator, handle).err(), Some(BadHandle(handle)));
    let next = secret.handle();
    drop(secret);
    for stale in [0, 1, handle, next, u64::MAX, u64::from(u32::MAX)] {
        assert_eq!(SecretPages::from_raw(&allocator, stale).err(), Some(BadHandle(stale)));
    }
}

#[test]
fn a_handle_leads_nowhere_while_its_owner_lives() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let secret = allocator.alloc_secret(pages(0)).unwrap();
    let mapped = allocator.alloc_mapped(pages(0)).unwrap();
    let handles = [secret.handle(), mapped.handle()];
    for handle in handles {
        let secret = SecretPages::from_raw(&allocator, handle).map(SecretPages::into_raw);
        let mapped = MappedPages::from_raw(&allocator, handle).map(MappedPages::into_raw);
        assert_eq!([secret, mapped], [Err(BadHandle(handle)); 2]);
    }
    assert_eq!([secret.into_raw(), mapped.into_raw()], handles, "it was foretold");
    let secret = SecretPages::from_raw(&allocator, handles[0]).unwrap();
    let mapped = MappedPages::from_raw(&allocator, handles[1]).unwrap();
    drop((secret, mapped));
    assert_eq!(allocator.counters().nr_allocated, 0);
}

#[test]
fn a_handle_that_was_never_used_is_no_handle_of_the_next_allocation() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    for _ in 0..3 {
        let mapped = allocator.alloc_mapped(pages(0)).unwrap();
        let (frames, foretold) = (mapped.frames(), mapped.handle());
        drop(mapped);
        let next = allocator.alloc_mapped(pages(0)).unwrap();
        assert_eq!(next.frames(), frames, "the same page is handed out again");
        let raw = next.into_raw();
        assert_ne!(raw, foretold);
        assert_eq!(MappedPages::from_raw(&allocator, foretold).err(), Some(BadHandle(foretold)));
        drop(MappedPages::from_raw(&allocator, raw).unwrap());
    }
}

#[test]
fn an_old_handle_does_not_reach_the_next_owner() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let mapped = allocator.alloc_mapped(pages(0)).unwrap();
    let (frames, old) = (mapped.frames(), mapped.handle());
    drop(mapped);
    let again = allocator.alloc_mapped(pages(0)).unwrap();
    assert_eq!(again.frames(), frames, "the same page is handed out again");
    assert_eq!(MappedPages::from_raw(&allocator, old).err(), Some(BadHandle(old)));
    drop(again);
}
