//! References to the regions that the VMM laid out. All of them consist of atomics, so that the
//! host may read and write them at any time.
#![allow(unsafe_code)]

use core::sync::atomic::{AtomicU64, Ordering};
use lacuna_abi::MAX_CPUS;
use lacuna_abi::addr::{BLOCK_SIZE, Gva, PAGE_SIZE};
use lacuna_abi::boot::BootInfo;
use lacuna_abi::event::{RECORD_WORDS, RING_RECORDS};
use lacuna_abi::gate::PAGE_WORDS;
use lacuna_abi::layout::{
    BOOT_INFO_OFFSET, Layout, SEQUENCE_OFFSET, SHARED, call_page_offset, report_page_offset,
    ring_offset,
};
use lacuna_guest::meta::{BlockMeta, PageMeta};

/// A page of words.
pub(crate) type WordPage = [AtomicU64; PAGE_WORDS];

/// One CPU's event ring.
#[repr(C)]
pub(crate) struct Ring {
    /// Head, tail, intent.
    pub(crate) control: WordPage,
    /// The records.
    pub(crate) records: [[AtomicU64; RECORD_WORDS]; RING_RECORDS as usize],
}

/// # Safety
/// `va` must be mapped for the guest's life, aligned for `T`, and hold a `T` of atomics.
unsafe fn at<T>(va: Gva) -> &'static T {
    // SAFETY: the caller's promise.
    unsafe { &*(va.0 as *const T) }
}

/// The boot information, copied.
pub(crate) fn boot_info() -> BootInfo {
    // SAFETY: the VMM maps the shared region before the first instruction; all regions are page
    // aligned.
    let page: &WordPage = unsafe { at(SHARED.wrapping_add(BOOT_INFO_OFFSET)) };
    let mut words = [0; BootInfo::WORDS];
    for (word, source) in words.iter_mut().zip(page) {
        *word = source.load(Ordering::Relaxed);
    }
    BootInfo::from_words(&words)
}

/// The sequence page: the number of the last event, then progress words.
pub(crate) fn sequence() -> &'static WordPage {
    // SAFETY: as `boot_info`.
    unsafe { at(SHARED.wrapping_add(SEQUENCE_OFFSET)) }
}

/// The call page of `cpu`.
pub(crate) fn call_page(cpu: usize) -> &'static WordPage {
    assert!(cpu < MAX_CPUS);
    // SAFETY: as `boot_info`; the VMM starts only CPUs that it laid out.
    unsafe { at(SHARED.wrapping_add(call_page_offset(cpu))) }
}

/// The report page of `cpu`.
pub(crate) fn report_page(cpu: usize) -> &'static WordPage {
    assert!(cpu < MAX_CPUS);
    // SAFETY: as `call_page`.
    unsafe { at(SHARED.wrapping_add(report_page_offset(cpu))) }
}

/// The event ring of `cpu`.
pub(crate) fn ring(cpu: usize) -> &'static Ring {
    assert!(cpu < MAX_CPUS);
    // SAFETY: as `call_page`.
    unsafe { at(SHARED.wrapping_add(ring_offset(cpu))) }
}

/// Metadata of every frame of the zone.
pub(crate) fn page_metadata(layout: &Layout) -> &'static [PageMeta] {
    let count = layout.zone.len / PAGE_SIZE;
    // SAFETY: the metadata region holds this many records, followed by those of the pageblocks,
    // is zero at the start, which is a valid state, and serves nothing else.
    unsafe { core::slice::from_raw_parts(layout.metadata.va.0 as *const PageMeta, count as usize) }
}

/// Metadata of every pageblock of the zone.
pub(crate) fn block_metadata(layout: &Layout) -> &'static [BlockMeta] {
    let count = layout.zone.len / BLOCK_SIZE;
    let start = layout.block_metadata().0 as *const BlockMeta;
    // SAFETY: as `page_metadata`.
    unsafe { core::slice::from_raw_parts(start, count as usize) }
}
