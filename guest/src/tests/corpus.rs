//! The fuzzer's corpus, replayed: `docs/testing.md` says how it is made.

use crate::testing::run_bytes;
use std::fs;
use std::path::Path;

#[test]
fn histories_that_the_fuzzer_kept_are_fine() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/allocator");
    let files = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut count = 0;
    for file in files {
        let path = file.unwrap().path();
        std::println!("{}", path.display());
        run_bytes(&fs::read(&path).unwrap());
        count += 1;
    }
    assert!(count >= 20, "the corpus has only {count} histories");
}
