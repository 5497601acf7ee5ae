//! Guest memory by address, and the memory functions that compiled code calls.
#![allow(unsafe_code)]

use core::arch::asm;
use core::sync::atomic::Ordering::{Acquire, Release};
use core::sync::atomic::compiler_fence;
use lacuna_abi::addr::{Gpa, Gva, PAGE_SIZE};
use lacuna_abi::event::TableFill;
use lacuna_abi::layout::{DIRECT_MAP, INPUT, MERMAP, Region, SCRATCH};
use lacuna_abi::paging::{Entry, Level};

/// Whether `bytes` from `va` lie in one of the root slots that hold no Rust object: the direct
/// map, the mermap, workload memory, and (to read) the input.
#[inline]
fn check(va: Gva, bytes: u64, write: bool) {
    let slot = Level::Pml4.index(va);
    let known = slot == const { Level::Pml4.index(DIRECT_MAP) }
        || slot == const { Level::Pml4.index(MERMAP) }
        || slot == const { Level::Pml4.index(SCRATCH) }
        || (!write && slot == const { Level::Pml4.index(INPUT) });
    let stays = bytes < Level::Pml4.span()
        && Level::Pml4.index(va.wrapping_add(bytes.saturating_sub(1))) == slot;
    assert!(known && stays && va.0 >> 47 == 0x1_ffff, "no data memory: {va}, {bytes} bytes");
}

/// The word at `va`.
#[inline]
pub(crate) fn load(va: Gva) -> u64 {
    check(va, 8, false);
    // SAFETY: `check` admits addresses that no Rust object lies at; an address that is not mapped
    // raises an exception, which ends the run with a report.
    let word = unsafe { (va.0 as *const u64).read_volatile() };
    // The processor keeps loads and stores in the order that the platform promises; the compiler
    // must too.
    compiler_fence(Acquire);
    word
}

/// Stores a word at `va`.
#[inline]
pub(crate) fn store(va: Gva, value: u64) {
    check(va, 8, true);
    compiler_fence(Release);
    // SAFETY: as `load`.
    unsafe { (va.0 as *mut u64).write_volatile(value) };
}

/// Zeroes `bytes` from `va`, by words.
#[inline]
pub(crate) fn zero(va: Gva, bytes: u64) {
    check(va, bytes, true);
    // SAFETY: as `load`. REP STOSQ because an interpreted ring 0 makes every instruction count,
    // and takes nine times as long by bytes.
    unsafe {
        asm!(
            "rep stosq",
            inout("rcx") bytes / 8 => _, inout("rdi") va.0 => _, in("rax") 0_u64,
            options(nostack, preserves_flags),
        );
    }
}

/// Copies `bytes` from `from` to `to`.
#[inline]
pub(crate) fn copy(to: Gva, from: Gva, bytes: u64) {
    check(to, bytes, true);
    check(from, bytes, false);
    // SAFETY: as `load`.
    unsafe { copy_words_then_bytes(to.0 as *mut u8, from.0 as *const u8, bytes as usize) };
}

/// The entry at `at` in the table pool, which is seen at the region's virtual place: itself or a copy.
#[inline]
pub(crate) fn read_entry(pool: &Region, at: Gpa) -> Entry {
    let va = entry_place(pool, at);
    // SAFETY: as `load`; only `write_entry` writes there.
    Entry(unsafe { (va.0 as *const u64).read_volatile() })
}

/// Writes the entry at `at` by one aligned store.
#[inline]
pub(crate) fn write_entry(pool: &Region, at: Gpa, entry: Entry) {
    let va = entry_place(pool, at);
    // SAFETY: as `load`. What the entry maps is the business of the allocator and the mermap: they
    // map zone frames only, in which no Rust object lies.
    unsafe { (va.0 as *mut u64).write_volatile(entry.0) };
}

/// Fills the whole table that `fill` names. Eight entries a turn: an interpreted ring 0 makes every
/// instruction count.
#[inline]
pub(crate) fn fill_table(pool: &Region, fill: &TableFill) {
    let first = entry_place(pool, fill.table);
    let last = entry_place(pool, fill.table.wrapping_add(PAGE_SIZE - 8));
    let mut place = first.0 as *mut u64;
    let mut entry = fill.first.0;
    let step = fill.entry(1).0.wrapping_sub(entry);
    while place as u64 <= last.0 {
        for index in 0..8 {
            // SAFETY: as `write_entry`; `last` lies in the pool, and a page holds a multiple of
            // eight entries.
            unsafe { place.add(index).write_volatile(entry) };
            entry = entry.wrapping_add(step);
        }
        place = place.wrapping_add(8);
    }
}

fn entry_place(pool: &Region, at: Gpa) -> Gva {
    match at.offset_from(pool.gpa) {
        Some(offset) if offset < pool.len && at.is_aligned(8) => pool.va.wrapping_add(offset),
        _ => panic!("no table entry can be at {at}"),
    }
}

/// # Safety
/// As for `memcpy`: valid for `len` bytes, not overlapping (or `to` below `from`).
#[inline]
unsafe fn copy_words_then_bytes(to: *mut u8, from: *const u8, len: usize) {
    // SAFETY: the caller's promise; both parts together copy `len` bytes upwards.
    unsafe {
        asm!(
            "rep movsq", "mov ecx, {rest:e}", "rep movsb",
            rest = in(reg) len % 8,
            inout("rcx") len / 8 => _, inout("rdi") to => _, inout("rsi") from => _,
            options(nostack, preserves_flags),
        );
    }
}

/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's promise.
    unsafe { copy_words_then_bytes(to, from, len) };
    to
}

/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: the caller's promise; going upwards overwrites nothing that is still to be read.
        unsafe { copy_words_then_bytes(to, from, len) };
    } else {
        // SAFETY: the caller's promise; the copy runs downwards from the last byte. The direction
        // flag is clear again afterwards.
        unsafe {
            asm!(
                "std", "rep movsb", "cld",
                inout("rcx") len => _,
                inout("rdi") to.wrapping_add(len).wrapping_sub(1) => _,
                inout("rsi") from.wrapping_add(len).wrapping_sub(1) => _,
                options(nostack),
            );
        }
    }
    to
}

/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    let [byte, ..] = byte.to_le_bytes();
    let word = u64::from(byte) * 0x0101_0101_0101_0101;
    // SAFETY: the caller's promise.
    unsafe {
        asm!(
            "rep stosq", "mov ecx, {rest:e}", "rep stosb",
            rest = in(reg) len % 8,
            inout("rcx") len / 8 => _, inout("rdi") to => _, in("rax") word,
            options(nostack, preserves_flags),
        );
    }
    to
}

/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    for index in 0..len {
        // SAFETY: the caller's promise. Volatile, so that the loop is not turned into a call of
        // this very function.
        let (x, y) = unsafe { (a.add(index).read_volatile(), b.add(index).read_volatile()) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

/// # Safety
/// As C's `bcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the caller's promise.
    unsafe { memcmp(a, b, len) }
}
