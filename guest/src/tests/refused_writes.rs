//! What a refused write to page tables leaves behind, under direct paging: the pages stay where they
//! were, and nothing is lost. Where it would leave tables that the guest's own records do not say, it
//! stops.

use super::flip::frames;
use crate::alloc::{AllocConfig, AllocError};
use crate::convert::ConvertError;
use crate::mermap::{MermapError, Protection};
use crate::platform::InterruptsOff;
use crate::testing::{EAGER, Mock, pages};
use lacuna_abi::gate::Status;

#[test]
fn blocks_whose_entries_stay_are_mapped_and_free_and_those_before_them_are_secret() {
    for nth in 0..3 {
        let mock = Mock::new(32, 1);
        let config = AllocConfig { prezero: false, pool_high: 3 * 512, ..EAGER };
        let allocator = mock.allocator_as(config);
        mock.refuse_write(nth);
        let refused = allocator.alloc_secret(pages(0)).err();
        assert!(matches!(refused, Some(AllocError::Gate(e)) if e.status == Status::Refused));
        let counters = allocator.counters();
        assert_eq!(counters.nr_free_unmapped, 512 * nth as u64);
        assert_eq!(counters.nr_allocated, 0);
        allocator.zone().check(&mock.map());
        assert!(allocator.alloc_secret(pages(0)).is_ok(), "nothing was lost");
    }
}

#[test]
fn a_refused_window_leaves_no_slot_and_no_entry() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let mermap = allocator.mermap();
    let block = frames(&mock, 0, 512);
    for (first, count) in [(0, 3), (0, 512)] {
        mock.refuse_write(0);
        let refused = mermap.get(frames(&mock, first, count), Protection::READ).err();
        assert!(matches!(refused, Some(MermapError::Refused(e)) if e.status == Status::Refused));
    }
    mock.refuse_write(0);
    let off = InterruptsOff::new(&mock);
    let refused = mermap.get_reserved(block.start(), Protection::READ, off).err();
    assert!(matches!(refused, Some(MermapError::Refused(_))));
    assert_eq!(mock.violations(), [""; 0]);
    mermap.teardown().unwrap();
    assert_eq!((mermap.counters().mapped, mermap.counters().mapped_reserved), (0, 0));
}

#[test]
fn pages_that_cannot_be_hidden_stay_mapped_and_their_block_is_whole_again() {
    // The fill of the new table, its link, the entries of the range.
    for nth in 0..3 {
        let mock = Mock::new(16, 1);
        let allocator = mock.allocator();
        let mapped = allocator.alloc_mapped(pages(1)).unwrap();
        mock.refuse_write(nth);
        let Err((mapped, error)) = mapped.into_secret() else { panic!("it was refused") };
        assert!(matches!(error, ConvertError::Gate(e) if e.status == Status::Refused));
        assert!(mock.in_direct_map(mock.layout.zone_frames()));
        assert_eq!(mock.state().live_tables(), 0);
        assert!(mapped.into_secret().is_ok(), "nothing was lost");
    }
}

#[test]
fn a_released_block_that_cannot_be_mapped_is_withheld() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    drop(allocator.alloc_secret(pages(0)).unwrap());
    // All of it is known to be zero: no window comes first.
    mock.refuse_write(0);
    assert!(allocator.shrink().is_err());
    let counters = allocator.counters();
    assert_eq!((counters.nr_allocated, counters.flip_to_mapped), (512, 0));
    allocator.zone().check(&mock.map());
}

#[test]
#[should_panic(expected = "refused to clear the entries of a window")]
fn a_window_that_stays_mapped_stops_the_guest() {
    let mock = Mock::new(16, 1);
    let allocator = mock.allocator();
    let window = allocator.mermap().get(frames(&mock, 0, 1), Protection::READ).unwrap();
    mock.refuse_write(0);
    drop(window);
}
