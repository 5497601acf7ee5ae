//! `docs/faults.md` says what the code says: every fault and slip, its rule, the vCPUs that it needs,
//! the seals under which it shows, and the functions that it is in.

mod support;

use lacuna::config::{Config, Overrides};
use lacuna_abi::fault::{Fault, Slip};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Cells of the table rows that start with a name in backticks, by that name.
fn rows(heading: &str) -> BTreeMap<String, Vec<String>> {
    let path = support::repository().join("docs/faults.md");
    let text = std::fs::read_to_string(path).unwrap();
    let section = text.split("\n## ").find(|part| part.starts_with(heading));
    let section = section.unwrap_or_else(|| panic!("docs/faults.md has no section {heading:?}"));
    let mut rows = BTreeMap::new();
    for line in section.lines().filter(|line| line.starts_with("| `")) {
        let cells: Vec<_> =
            line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect();
        let name = cells[0].trim_matches('`').to_owned();
        assert!(rows.insert(name.clone(), cells).is_none(), "{name} is listed twice");
    }
    rows
}

/// File and function of every use of a macro in the guest, by what it names.
fn places(name: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut places: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for file in std::fs::read_dir(support::repository().join("guest/src")).unwrap() {
        let path = file.unwrap().path();
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        let file = path.file_name().unwrap().to_string_lossy().into_owned();
        let mut function = String::new();
        for line in text.lines() {
            let start = line.split("fn ").nth(1).filter(|_| !line.trim_start().starts_with("//"));
            if let Some(rest) = start {
                function = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            }
            for used in line.split(&format!("{name}!(self.platform, ")).skip(1) {
                let variant = used.split(')').next().unwrap().to_owned();
                places.entry(variant).or_default().insert(format!("{file}: {function}"));
            }
        }
    }
    places
}

/// Names in a cell, without backticks.
fn list(cell: &str, separator: &str) -> BTreeSet<String> {
    cell.split(separator).map(|part| part.replace('`', "").trim().to_owned()).collect()
}

/// What a row must say beside its name: rule and modes, vCPUs, seals, places.
type Row<'a> = (&'a str, &'a [&'a str], u8, &'a [&'a str], &'a BTreeSet<String>);

fn check_row(cells: &[String], (rule, found_under, vcpus, seals, places): Row<'_>) {
    let [_, slip, found, modes, needed, under, _, place] = cells else {
        panic!("{cells:?} has {} cells", cells.len());
    };
    assert!(!slip.is_empty());
    assert_eq!(found, &format!("`{rule}`"), "{cells:?}");
    assert_eq!(modes, &found_under.join(", "), "{cells:?}");
    assert_eq!(needed, &vcpus.to_string(), "{cells:?}");
    let known: BTreeSet<_> = seals.iter().map(|seal| (*seal).to_owned()).collect();
    assert_eq!(list(under, ","), known, "{cells:?}");
    assert_eq!(&list(place, ";"), places, "{cells:?}");
}

#[test]
fn the_table_of_faults_is_that_of_the_code() {
    let (rows, places) = (rows("Faults that can be planted"), places("planted"));
    let named: Vec<_> = Fault::ALL.iter().map(|fault| fault.name()).collect();
    let listed: BTreeSet<_> = rows.keys().map(String::as_str).collect();
    assert_eq!(listed, named.iter().copied().collect());
    let variants: BTreeSet<_> = Fault::ALL.iter().map(|fault| format!("{fault:?}")).collect();
    assert_eq!(places.keys().cloned().collect::<BTreeSet<_>>(), variants);
    for fault in Fault::ALL {
        let seals = support::matrix::seals(*fault);
        let place = &places[&format!("{fault:?}")];
        let row = (fault.rule(), fault.modes(), fault.vcpus(), seals, place);
        check_row(&rows[fault.name()], row);
    }
}

#[test]
fn the_table_of_slips_is_that_of_the_code() {
    let (rows, places) = (rows("Further slips that the tests plant"), places("slips"));
    let listed: BTreeSet<_> = rows.keys().map(String::as_str).collect();
    assert_eq!(listed, Slip::ALL.iter().map(|slip| slip.name()).collect());
    for slip in Slip::ALL {
        let place = &places[&format!("{slip:?}")];
        let seals = support::slips::seals(*slip);
        let row = (slip.rule(), &["trace", "tables", "step"][..], slip.vcpus(), seals, place);
        check_row(&rows[slip.name()], row);
    }
}

#[test]
fn inject_takes_every_fault_of_the_table_and_no_slip() {
    let text = "[guest]\nvcpus = 2\n[workload]\nprogram = \"idle\"\n";
    let inject = |name: &str| {
        let overrides = Overrides { inject: vec![name.to_owned()], ..Overrides::default() };
        Config::from_text(Path::new("x.toml"), text, &overrides)
    };
    for name in rows("Faults that can be planted").keys() {
        assert_eq!(inject(name).unwrap().inject.len(), 1, "{name}");
    }
    for name in rows("Further slips that the tests plant").keys() {
        assert!(inject(name).is_err(), "--inject takes {name}");
    }
}
