//! Names of the functions whose code made records, for reports.
//!
//! A record carries a *site* ([`Record::site`](lacuna_abi::event::Record::site)): in an image the low
//! half of an address, in a simulated guest, which is a part of this program, a distance from a
//! fixed place in it. A guest can write whatever it likes there: what leads to no function has no
//! name.
#![forbid(unsafe_code)]

use crate::image::Image;
use crate::machine::sys;
use object::elf::{FileHeader64, PT_LOAD, SHT_SYMTAB, STT_FUNC};
use object::read::elf::{FileHeader, ProgramHeader, Sym};
use object::{Endianness, ReadCache, ReadRef};
use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::fs::File;
use std::sync::Arc;

/// Where this program's own code is read from.
const PROGRAM: &str = "/proc/self/exe";
/// Longest name that is taken apart, and deepest nesting in it: images are their authors'.
const MAX_NAME: usize = 4096;
const MAX_DEPTH: usize = 8;
/// How the name of code that drops a value starts.
const DROP: &str = "core::ptr::drop_in_place<";
/// Parts of a path that are shown: module, type, function.
const PARTS: usize = 3;

/// Where the code lies whose records are to be named.
#[derive(Clone, Debug)]
pub enum Names {
    /// In an image.
    Image(Arc<Image>),
    /// In this program.
    Program,
    /// Somewhere else: the names that a recording has.
    Known(BTreeMap<u32, String>),
}

impl Names {
    /// The functions that hold these sites, by site, with short names. A site that lies in no
    /// function is left out; so are all if this program has no symbols.
    #[must_use]
    pub fn functions(&self, sites: &BTreeSet<u32>) -> BTreeMap<u32, String> {
        match self {
            _ if sites.is_empty() => BTreeMap::new(),
            Self::Image(image) => {
                let name = |site: &u32| Some((*site, short(image.function(in_image(*site))?.1)));
                sites.iter().filter_map(name).collect()
            }
            Self::Program => in_program(sites).unwrap_or_default(),
            Self::Known(names) => {
                let name = |site: &u32| Some((*site, names.get(site)?.clone()));
                sites.iter().filter_map(name).collect()
            }
        }
    }
}

/// The address of a site: an image lies in the highest 2 GiB.
fn in_image(site: u32) -> u64 {
    i64::from(site.cast_signed()).cast_unsigned()
}

/// One pass over the symbols of this program.
fn in_program(sites: &BTreeSet<u32>) -> Result<BTreeMap<u32, String>, Box<dyn Error>> {
    let file = ReadCache::new(File::open(PROGRAM)?);
    let header = FileHeader64::<Endianness>::parse(&file)?;
    let endian = header.endian()?;
    let place = fixed_place(header, endian, &file)?;
    let address = |site: &u32| (place.wrapping_add(in_image(*site)), *site);
    let addresses: BTreeMap<u64, u32> = sites.iter().map(address).collect();
    let sections = header.sections(endian, &file)?;
    let symbols = sections.symbols(endian, &file, SHT_SYMTAB)?;
    let mut names = BTreeMap::new();
    for symbol in symbols.iter().filter(|symbol| symbol.st_type() == STT_FUNC) {
        let start = symbol.st_value(endian);
        let end = start.saturating_add(symbol.st_size(endian));
        for site in addresses.range(start..end).map(|(_, site)| *site) {
            let name = String::from_utf8_lossy(symbol.name(endian, symbols.strings())?);
            names.insert(site, short(&format!("{:#}", rustc_demangle::demangle(&name))));
        }
    }
    Ok(names)
}

/// Where the fixed place of [`sys::here_in_code`] lies in the program's file, as its symbols count.
fn fixed_place<'f>(
    header: &FileHeader64<Endianness>,
    endian: Endianness,
    file: impl ReadRef<'f>,
) -> Result<u64, Box<dyn Error>> {
    let place = sys::fixed_place();
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let offset = maps.lines().find_map(|line| offset_in_file(line, place));
    let offset = offset.ok_or("the program's code is not mapped from a file")?;
    let headers = header.program_headers(endian, file)?;
    let loaded = headers.iter().filter(|part| part.p_type(endian) == PT_LOAD);
    let part = loaded.map(|part| (part.p_offset(endian), part.p_filesz(endian), part));
    let part = part.filter_map(|(from, len, part)| Some((offset.checked_sub(from)?, len, part)));
    let (within, _, part) = part
        .min_by_key(|(within, _, _)| *within)
        .filter(|(within, len, _)| within < len)
        .ok_or("no such part")?;
    Ok(part.p_vaddr(endian).wrapping_add(within))
}

/// The offset in its file of what lies at `address`, if the line of `/proc/self/maps` covers it.
fn offset_in_file(line: &str, address: u64) -> Option<u64> {
    let mut fields = line.split_ascii_whitespace();
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let (start, end) = fields.next()?.split_once('-')?;
    let (start, end) = (hex(start)?, hex(end)?);
    let offset = hex(fields.nth(1)?)?;
    (start..end).contains(&address).then(|| offset + (address - start))
}

/// The last parts of a demangled path, without crate hashes and generic arguments:
/// `flip::PageAllocator::hide` for
/// `lacuna_guest::flip::<impl lacuna_guest::alloc::PageAllocator<P>>::hide`.
#[must_use]
pub fn short(name: &str) -> String {
    if name.len() > MAX_NAME {
        return name.chars().take(60).chain("…".chars()).collect();
    }
    if let Some(dropped) = name.strip_prefix(DROP).and_then(|rest| rest.strip_suffix('>')) {
        // Where a guard's own code became part of the code that drops it.
        return format!("drop of {}", last_parts(dropped));
    }
    last_parts(name)
}

fn last_parts(name: &str) -> String {
    let parts = parts(name, MAX_DEPTH);
    let shown = parts.len().saturating_sub(PARTS);
    if parts.is_empty() { name.to_owned() } else { parts[shown..].join("::") }
}

/// The parts of a path that are names.
fn parts(path: &str, depth: usize) -> Vec<String> {
    let name = |part: &str| -> Option<String> {
        let part = part.trim();
        if let Some(inner) = part.strip_prefix('<') {
            let inner = inner.strip_suffix('>').unwrap_or(inner);
            let inner = inner.strip_prefix("impl ").unwrap_or(inner);
            let inner = split(inner, " as ").first().copied().unwrap_or(inner);
            let inner = split(inner, " for ").last().copied().unwrap_or(inner);
            return parts(inner, depth.checked_sub(1)?).pop();
        }
        let name = part.split('<').next().unwrap_or(part);
        let is_name = name.starts_with(|char: char| char.is_alphabetic() || char == '_');
        is_name.then(|| name.to_owned())
    };
    split(path, "::").into_iter().filter_map(name).collect()
}

/// Splits where `by` stands outside all brackets.
fn split<'n>(text: &'n str, by: &str) -> Vec<&'n str> {
    let (mut depth, mut from, mut pieces) = (0_usize, 0, Vec::new());
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'<' | b'(' | b'[' | b'{' => depth += 1,
            b'>' if at > 0 && text.as_bytes()[at - 1] == b'-' => {}
            b'>' | b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ if depth == 0 && at >= from && text.as_bytes()[at..].starts_with(by.as_bytes()) => {
                pieces.push(&text[from..at]);
                from = at + by.len();
            }
            _ => {}
        }
    }
    pieces.push(&text[from..]);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ORDINARY;
    use proptest::prelude::*;

    #[test]
    fn names_are_short_and_keep_module_type_and_function() {
        for (long, expected) in [
            (
                "lacuna_guest::flip::<impl lacuna_guest::alloc::PageAllocator<P>>::hide",
                "flip::PageAllocator::hide",
            ),
            (
                "lacuna_guest::flip::<impl a::Alloc<P>>::close::{{closure}}::{{closure}}",
                "flip::Alloc::close",
            ),
            ("<guest::machine::Machine as guest::platform::Platform>::life", "Machine::life"),
            ("<a::b::Alloc<c::Machine>>::hide::{closure#0}", "Alloc::hide"),
            ("a::b::Rig<P,S>::flip", "b::Rig::flip"),
            (
                "core::ptr::drop_in_place<a::mermap::Mapping<b::Machine>>",
                "drop of a::mermap::Mapping",
            ),
            ("core::ptr::read<fn(a::B) -> c::D>", "core::ptr::read"),
            ("lacuna_start", "lacuna_start"),
            ("<impl a::Trait for b::Type>::f", "Type::f"),
            ("<(a::B, c::D) as e::F>::g", "g"),
        ] {
            assert_eq!(short(long), expected, "{long}");
        }
    }

    proptest! {
        #[test]
        fn any_name_can_be_shortened(name in any::<String>(), path in "[<>:{}a-c ]{0,300}") {
            prop_assert!(short(&name).len() <= name.len().max(200));
            prop_assert!(short(&path).len() <= path.len().max(200));
        }
    }

    #[test]
    fn sites_of_an_image_are_named_and_garbage_is_not() {
        let image = Image::parse(ORDINARY).unwrap();
        let entry = u32::try_from(image.entry.0 & 0xffff_ffff).unwrap();
        let names = Names::Image(Arc::new(image));
        let sites = BTreeSet::from([0, 1, entry, 0x7fff_ffff, 0x8000_0000, u32::MAX]);
        assert_eq!(names.functions(&sites), BTreeMap::from([(entry, "lacuna_start".to_owned())]));
    }

    #[inline(never)]
    fn some_function() -> u32 {
        sys::here_in_code()
    }

    #[test]
    fn sites_of_this_program_are_named_and_garbage_is_not() {
        let site = some_function();
        let sites = BTreeSet::from([site, 0x8000_0000, 0x7fff_ffff]);
        let names = Names::Program.functions(&sites);
        assert_eq!(names, BTreeMap::from([(site, "names::tests::some_function".to_owned())]));
    }

    #[test]
    fn a_line_of_the_maps_gives_the_offset_in_the_file() {
        let line = "7f00-8000 r-xp 00003000 08:01 1234   /usr/bin/a file";
        assert_eq!(offset_in_file(line, 0x7f10), Some(0x3010));
        assert_eq!(offset_in_file(line, 0x8000), None);
        assert_eq!(offset_in_file("nonsense", 0), None);
    }
}
