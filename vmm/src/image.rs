//! Kernel images: the embedded ones, and any other ELF that follows the same rules.

use crate::printable::steers;
use lacuna_abi::ABI_VERSION;
use lacuna_abi::addr::{Gva, PAGE_SIZE};
use lacuna_abi::layout::IMAGE;
use lacuna_abi::paging::Entry;
use object::elf::{ET_EXEC, FileHeader64, PF_W, PF_X, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader, SectionHeader, Sym};
use object::{Endianness, read};

/// The ordinary image.
pub const ORDINARY: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));
/// The image that contains the faults that can be planted.
pub const WITH_FAULTS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-faults.elf"));
/// The target that the embedded images were built for.
pub const TARGET: &str = env!("LACUNA_GUEST_TARGET");

/// Largest image that is taken, in bytes from its first to its last address.
const MAX_BYTES: u64 = 64 << 20;
/// Longest name of a function that is kept, in bytes, and most bytes of all names; without a name an
/// address has to do.
const MAX_NAME: usize = 4096;
const MAX_NAME_BYTES: usize = 32 << 20;
/// Section that holds the version of the ABI that an image was built for.
const ABI_SECTION: &[u8] = b".lacuna.abi";

/// Why an image cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It is no ELF file that can be read.
    #[error("no readable 64-bit ELF file: {0}")]
    Elf(#[from] read::Error),
    /// It is an ELF file of another kind.
    #[error("not a static x86-64 executable")]
    Kind,
    /// A segment is not where images belong.
    #[error(
        "a segment, {len:#x} bytes at {va:#x}, is outside {IMAGE} and the 64 MiB behind it or not page-aligned; link with guest/image.ld"
    )]
    Place {
        /// First address.
        va: u64,
        /// Bytes.
        len: u64,
    },
    /// A segment is writable and executable.
    #[error("the segment at {0:#x} is both writable and executable")]
    WriteExecute(u64),
    /// Two segments share a page.
    #[error("two segments share the page at {0:#x}")]
    Overlap(u64),
    /// No segment is to be loaded, or the entry point lies in none that is executable.
    #[error("the entry point, {0:#x}, lies in no executable segment")]
    Entry(u64),
    /// It was built for another version of the ABI, or for none.
    #[error(
        "built for version {found:?} of the Lacuna ABI, this VMM has version {ABI_VERSION}; build it again"
    )]
    Abi {
        /// What the image says.
        found: Option<u64>,
    },
}

/// A part of an image with rights of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First address, page-aligned.
    pub va: Gva,
    /// Bytes in memory; those behind `bytes` are zero.
    pub len: u64,
    /// Contents.
    pub bytes: Vec<u8>,
    /// Flags of its page-table entries.
    pub flags: u64,
}

#[derive(Clone, Debug)]
struct Symbol {
    start: u64,
    len: u64,
    name: String,
}

/// An image, checked.
#[derive(Clone, Debug)]
pub struct Image {
    /// Where the first CPU starts.
    pub entry: Gva,
    /// Segments in order of address; no two share a page.
    pub segments: Vec<Segment>,
    symbols: Vec<Symbol>,
}

impl Image {
    /// Reads and checks an ELF file.
    ///
    /// # Errors
    /// [`ImageError`] for anything that cannot be started; no content makes this panic.
    pub fn parse(file: &[u8]) -> Result<Self, ImageError> {
        let header = FileHeader64::<Endianness>::parse(file)?;
        let endian = header.endian()?;
        if header.e_type(endian) != ET_EXEC || header.e_machine(endian) != object::elf::EM_X86_64 {
            return Err(ImageError::Kind);
        }
        let mut segments = Vec::new();
        for program in header.program_headers(endian, file)? {
            if program.p_type(endian) == PT_LOAD && program.p_memsz(endian) > 0 {
                segments.push(segment(program, endian, file)?);
            }
        }
        segments.sort_by_key(|s| s.va);
        for pair in segments.windows(2) {
            if pair[0].va.0 + pair[0].len.next_multiple_of(PAGE_SIZE) > pair[1].va.0 {
                return Err(ImageError::Overlap(pair[1].va.0));
            }
        }
        let entry = header.e_entry(endian);
        let executable = |s: &&Segment| s.flags & Entry::NO_EXECUTE == 0;
        if !segments.iter().filter(executable).any(|s| (s.va.0..s.va.0 + s.len).contains(&entry)) {
            return Err(ImageError::Entry(entry));
        }
        let sections = header.sections(endian, file)?;
        let found = match sections.section_by_name(endian, ABI_SECTION) {
            Some((_, section)) => section.data(endian, file)?.first_chunk().copied(),
            None => None,
        };
        let found = found.map(u64::from_le_bytes);
        if found != Some(ABI_VERSION) {
            return Err(ImageError::Abi { found });
        }
        let table = sections.symbols(endian, file, object::elf::SHT_SYMTAB)?;
        let (mut symbols, mut name_bytes) = (Vec::new(), 0);
        for symbol in table.iter() {
            let name = symbol.name(endian, table.strings())?;
            if symbol.st_value(endian) >= IMAGE.0 && (1..=MAX_NAME).contains(&name.len()) {
                let name = readable(name);
                name_bytes += name.len();
                // Many symbols may share one long name in the file.
                if name_bytes > MAX_NAME_BYTES {
                    break;
                }
                let (start, len) = (symbol.st_value(endian), symbol.st_size(endian));
                symbols.push(Symbol { start, len, name });
            }
        }
        symbols.sort_by_key(|symbol| (symbol.start, symbol.len));
        Ok(Self { entry: Gva(entry), segments, symbols })
    }

    /// Bytes from the first address of the image region to the end of the last segment.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.segments.last().map_or(0, |s| s.va.0 + s.len - IMAGE.0)
    }

    /// Whether the image has no segments; a parsed one always has.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// The function that holds `address`, and how far in: `name+0x12`.
    #[must_use]
    pub fn symbolise(&self, address: u64) -> Option<String> {
        let (start, name) = self.function(address)?;
        Some(format!("{name}+{:#x}", address - start))
    }

    /// Addresses, bytes and names of all functions with their code. A symbol without a size reaches
    /// to the next one.
    pub fn functions(&self) -> impl Iterator<Item = (u64, &[u8], &str)> {
        self.symbols.iter().enumerate().filter_map(|(index, symbol)| {
            let text = |s: &&Segment| s.flags & Entry::NO_EXECUTE == 0;
            let offset = |s: &Segment| symbol.start.checked_sub(s.va.0).filter(|o| *o < s.len);
            let segment = self.segments.iter().filter(text).find(|s| offset(s).is_some())?;
            let len = if symbol.len == 0 {
                let next = self.symbols[index + 1..].iter().find(|s| s.start > symbol.start);
                next.map_or(segment.len, |s| s.start - symbol.start)
            } else {
                symbol.len
            };
            let start = usize::try_from(offset(segment)?).ok()?;
            let end = usize::try_from(len).ok()?.saturating_add(start).min(segment.bytes.len());
            Some((symbol.start, segment.bytes.get(start..end)?, symbol.name.as_str()))
        })
    }

    /// Start and name of the function that holds `address`. A symbol without a size reaches to the
    /// next one.
    #[must_use]
    pub fn function(&self, address: u64) -> Option<(u64, &str)> {
        let text = |s: &&Segment| s.flags & Entry::NO_EXECUTE == 0;
        if !self.segments.iter().filter(text).any(|s| address.wrapping_sub(s.va.0) < s.len) {
            return None;
        }
        let index = self.symbols.partition_point(|s| s.start <= address).checked_sub(1)?;
        let symbol = self.symbols.get(index)?;
        let inside = symbol.len == 0 || address - symbol.start < symbol.len;
        inside.then_some((symbol.start, symbol.name.as_str()))
    }
}

/// A symbol's name without its mangling, and without anything that could dress up what surrounds it.
fn readable(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    let full = format!("{:#}", rustc_demangle::demangle(&name));
    full.chars().filter(|char| !steers(*char)).take(MAX_NAME).collect()
}

fn segment(
    program: &object::elf::ProgramHeader64<Endianness>,
    endian: Endianness,
    file: &[u8],
) -> Result<Segment, ImageError> {
    let (va, len) = (program.p_vaddr(endian), program.p_memsz(endian));
    let offset = va.checked_sub(IMAGE.0);
    let fits = offset.and_then(|o| o.checked_add(len)).is_some_and(|end| end <= MAX_BYTES);
    if !fits || !va.is_multiple_of(PAGE_SIZE) {
        return Err(ImageError::Place { va, len });
    }
    let rights = program.p_flags(endian);
    let flags = match (rights.contains(PF_W), rights.contains(PF_X)) {
        (true, true) => return Err(ImageError::WriteExecute(va)),
        (true, false) => Entry::DATA,
        (false, true) => Entry::TEXT,
        (false, false) => Entry::READ_ONLY,
    };
    let data = program.data(endian, file).map_err(|()| ImageError::Place { va, len })?;
    let bytes = data[..data.len().min(usize::try_from(len).unwrap_or(usize::MAX))].to_vec();
    Ok(Segment { va: Gva(va), len, bytes, flags })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_images_can_be_started() {
        for bytes in [ORDINARY, WITH_FAULTS] {
            let image = Image::parse(bytes).unwrap();
            assert!((1..1 << 20).contains(&image.len()));
            assert!(image.symbolise(image.entry.0).unwrap().starts_with("lacuna_start+0x0"));
        }
    }

    #[test]
    fn functions_are_listed_with_their_code() {
        let image = Image::parse(ORDINARY).unwrap();
        let start = image.functions().find(|(_, _, name)| *name == "lacuna_start").unwrap();
        assert_eq!(start.0, image.entry.0);
        assert!(!start.1.is_empty());
        assert!(
            image.functions().any(|(_, code, name)| name == "exception_stubs" && !code.is_empty())
        );
    }

    #[test]
    fn an_address_outside_the_text_has_no_name() {
        let image = Image::parse(ORDINARY).unwrap();
        assert_eq!(image.symbolise(0), None);
        assert_eq!(image.symbolise(u64::MAX), None);
    }

    #[test]
    fn damaged_images_are_refused() {
        assert!(matches!(Image::parse(b""), Err(ImageError::Elf(_))));
        assert!(matches!(
            Image::parse(b"#!/bin/sh\necho this is no ELF file at all, though it is long enough"),
            Err(ImageError::Elf(_))
        ));
        let mut other = ORDINARY.to_vec();
        other[18] = 0xb7; // EM_AARCH64
        assert!(matches!(Image::parse(&other), Err(ImageError::Kind)));
        let mut moved = ORDINARY.to_vec();
        moved[24..32].copy_from_slice(&0x1000_u64.to_le_bytes());
        assert!(matches!(Image::parse(&moved), Err(ImageError::Entry(0x1000))));
        for end in (0..ORDINARY.len()).step_by(997) {
            let _ = Image::parse(&ORDINARY[..end]);
        }
    }

    #[test]
    fn an_image_for_another_abi_is_refused() {
        let mut other = ORDINARY.to_vec();
        let header = FileHeader64::<Endianness>::parse(ORDINARY).unwrap();
        let sections = header.sections(Endianness::Little, ORDINARY).unwrap();
        let (_, abi) = sections.section_by_name(Endianness::Little, ABI_SECTION).unwrap();
        let at = usize::try_from(abi.sh_offset(Endianness::Little)).unwrap();
        other[at] = 77;
        assert!(matches!(Image::parse(&other), Err(ImageError::Abi { found: Some(77) })));
    }
}
