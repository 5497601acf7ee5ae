//! Which Debian this is, and where its packages come from: pure functions of the texts in which the
//! host says so (os-release(5), sources.list(5)).

use std::path::PathBuf;

/// A release of Debian.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Release {
    /// Its code name, which is also the name of its suite.
    pub codename: String,
    /// Whether it has been released: only then is there a suite of backports for it.
    pub stable: bool,
}

impl Release {
    /// Reads `/etc/os-release`. `Err` has the name of another distribution.
    ///
    /// # Errors
    /// The name of what this is, if it is not Debian.
    pub fn parse(os_release: &str) -> Result<Self, String> {
        let value = |key: &str| {
            let line =
                os_release.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
            line.map(|value| value.trim().trim_matches(['"', '\'']).to_owned())
        };
        let name = || value("PRETTY_NAME").unwrap_or_else(|| "an unknown system".into());
        match (value("ID").as_deref(), value("VERSION_CODENAME")) {
            (Some("debian"), Some(codename)) if is_name(&codename) => {
                Ok(Self { codename, stable: value("VERSION_ID").is_some() })
            }
            _ => Err(name()),
        }
    }
}

/// A place that packages come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Origin {
    /// The archive.
    pub uri: String,
    /// Its suites.
    pub suites: Vec<String>,
    /// What its signature is checked with; apt's trusted keys if `None`.
    pub signed_by: Option<PathBuf>,
}

/// Debian's own keys; the second name is that of later releases.
pub const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// All origins of binary packages of the component `main` that these files name: `.list` files in the
/// one-line style, `.sources` files in the deb822 style. What a source says about trust is left
/// out: a signature is always checked.
#[must_use]
pub fn origins<'f>(files: impl IntoIterator<Item = (&'f str, &'f str)>) -> Vec<Origin> {
    let mut origins = Vec::new();
    for (name, text) in files {
        if name.ends_with(".sources") {
            origins.extend(stanzas(text).iter().flat_map(deb822));
        } else {
            origins.extend(text.lines().filter_map(one_line));
        }
    }
    origins
}

/// The origins for a lab: the archive that has the release itself, with its suite of backports where
/// there is one, and what has its updates. The first mirror that is named is taken.
#[must_use]
pub fn for_release(release: &Release, known: &[Origin]) -> Vec<Origin> {
    let codename = release.codename.as_str();
    let is_debian = |origin: &&Origin| origin.uri.trim_end_matches('/').ends_with("debian");
    let with = |suite: &str| {
        let mut having = known.iter().filter(|origin| origin.suites.iter().any(|s| s == suite));
        // Others name their suites after Debian's releases too.
        having.clone().find(is_debian).or_else(|| having.next()).cloned()
    };
    let Some(main) = with(codename) else { return Vec::new() };
    let mut suites = vec![codename.to_owned()];
    if release.stable {
        suites.push(backports(codename));
    }
    let mut origins = vec![Origin { suites, ..main }];
    for suite in [format!("{codename}-updates"), format!("{codename}-security")] {
        if let Some(origin) = with(&suite) {
            origins.push(Origin { suites: vec![suite], ..origin });
        }
    }
    origins
}

/// The suite of backports to a release.
#[must_use]
pub fn backports(codename: &str) -> String {
    format!("{codename}-backports")
}

/// These origins as a `.sources` file. What names no keys of its own is checked with `keyring`.
#[must_use]
pub fn to_deb822(origins: &[Origin], keyring: Option<&str>) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    for Origin { uri, suites, signed_by } in origins {
        // Writing to a string does not fail.
        _ = writeln!(text, "Types: deb\nURIs: {uri}\nSuites: {}", suites.join(" "));
        _ = writeln!(text, "Components: main\nArchitectures: amd64");
        let own = signed_by.as_ref().map(|path| path.display().to_string());
        if let Some(keys) = own.as_deref().or(keyring) {
            _ = writeln!(text, "Signed-By: {keys}");
        }
        text.push('\n');
    }
    text
}

/// A line `deb [options] URI suite components…`.
fn one_line(line: &str) -> Option<Origin> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb")?;
    let rest = rest.strip_prefix([' ', '\t'])?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let signed_by = options
        .split_whitespace()
        .find_map(|option| option.strip_prefix("signed-by="))
        .and_then(keys);
    words.any(|component| component == "main").then(|| Origin {
        uri: uri.to_owned(),
        suites: vec![suite.to_owned()],
        signed_by,
    })
}

/// The fields of a stanza, with lower-case names.
type Stanza = Vec<(String, String)>;

fn stanzas(text: &str) -> Vec<Stanza> {
    let mut stanzas = vec![Stanza::new()];
    for line in text.lines() {
        if line.starts_with('#') {
            continue;
        }
        let Some(stanza) = stanzas.last_mut() else { break };
        if line.trim().is_empty() {
            stanzas.push(Stanza::new());
        } else if line.starts_with([' ', '\t']) {
            // A field goes on.
            if let Some((_, value)) = stanza.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            stanza.push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    stanzas
}

fn deb822(stanza: &Stanza) -> Vec<Origin> {
    let value = |name: &str| stanza.iter().find(|(n, _)| n == name).map_or("", |(_, v)| v.as_str());
    let has = |name: &str, word: &str| value(name).split_whitespace().any(|w| w == word);
    let off =
        ["no", "false", "0", "off"].iter().any(|no| value("enabled").eq_ignore_ascii_case(no));
    if off || !has("types", "deb") || !has("components", "main") {
        return Vec::new();
    }
    let suites: Vec<_> = value("suites").split_whitespace().map(str::to_owned).collect();
    let signed_by = keys(value("signed-by"));
    let uris = value("uris").split_whitespace();
    uris.map(|uri| Origin {
        uri: uri.to_owned(),
        suites: suites.clone(),
        signed_by: signed_by.clone(),
    })
    .collect()
}

/// The file that a field or option about keys names. Fingerprints and embedded keys are not taken
/// along: Debian's own keyring stands in for them.
fn keys(value: &str) -> Option<PathBuf> {
    let path = value.trim();
    (path.starts_with('/') && !path.contains([' ', ','])).then(|| PathBuf::from(path))
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(uri: &str, suites: &[&str], signed_by: Option<&str>) -> Origin {
        Origin {
            uri: uri.into(),
            suites: suites.iter().map(|suite| (*suite).to_owned()).collect(),
            signed_by: signed_by.map(PathBuf::from),
        }
    }

    fn stable(codename: &str) -> Release {
        Release { codename: codename.into(), stable: true }
    }

    #[test]
    fn a_release_is_read_and_anything_else_named() {
        let bookworm = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nVERSION_ID=\"12\"\n\
                        VERSION_CODENAME=bookworm\nID=debian\n";
        assert_eq!(Release::parse(bookworm), Ok(stable("bookworm")));
        let testing =
            "PRETTY_NAME=\"Debian GNU/Linux forky/sid\"\nVERSION_CODENAME=forky\nID=debian\n";
        let forky = Release { codename: "forky".into(), stable: false };
        assert_eq!(Release::parse(testing), Ok(forky));
        let ubuntu =
            "PRETTY_NAME=\"Ubuntu 24.04\"\nID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n";
        assert_eq!(Release::parse(ubuntu), Err("Ubuntu 24.04".into()));
        assert!(Release::parse("").is_err());
        assert!(Release::parse("ID=debian\nVERSION_CODENAME=../etc\n").is_err());
    }

    const ONE_LINE: &str = "\
# deb http://old.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/mine.gpg trusted=yes] http://a.example/debian bookworm main contrib
deb-src http://a.example/debian bookworm main
deb\thttp://b.example/debian-security bookworm-security main # security
deb http://c.example/linux bookworm stable
debris http://d.example/debian bookworm main
";

    const DEB822: &str = "\
Types: deb deb-src
# a comment
URIs: http://a.example/debian http://b.example/debian
Suites: bookworm
 bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no

Types: deb
URIs: http://keyed.example/debian
Suites: bookworm
Components: main
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mDMEYCQjIxYJKwYBBAHaRw8BAQdAD/P5Nvvnvk66SxBBHDbhRml9ORg1WV5CvzKY
 -----END PGP PUBLIC KEY BLOCK-----
";

    #[test]
    fn sources_in_both_styles_are_read() {
        assert_eq!(
            origins([("sources.list", ONE_LINE)]),
            [
                origin(
                    "http://a.example/debian",
                    &["bookworm"],
                    Some("/usr/share/keyrings/mine.gpg")
                ),
                origin("http://b.example/debian-security", &["bookworm-security"], None),
            ]
        );
        let both = ["bookworm", "bookworm-updates"];
        let keys = Some(KEYRINGS[0]);
        assert_eq!(
            origins([("debian.sources", DEB822)]),
            [
                origin("http://a.example/debian", &both, keys),
                origin("http://b.example/debian", &both, keys),
                origin("http://keyed.example/debian", &["bookworm"], None),
            ]
        );
    }

    #[test]
    fn a_lab_takes_one_mirror_its_backports_and_its_updates() {
        let known = [
            origin("http://third.example/party", &["bookworm"], None),
            origin("http://a.example/debian/", &["bookworm", "bookworm-updates"], None),
            origin("http://b.example/debian", &["bookworm"], None),
            origin("http://s.example/debian-security", &["bookworm-security"], None),
        ];
        assert_eq!(
            for_release(&stable("bookworm"), &known),
            [
                origin("http://a.example/debian/", &["bookworm", "bookworm-backports"], None),
                origin("http://a.example/debian/", &["bookworm-updates"], None),
                origin("http://s.example/debian-security", &["bookworm-security"], None),
            ]
        );
        let forky = Release { codename: "forky".into(), stable: false };
        assert_eq!(for_release(&forky, &known), [], "nothing has it");
        let only = [origin("http://a.example/debian", &["forky"], None)];
        assert_eq!(for_release(&forky, &only), only, "there are no backports to it");
    }

    #[test]
    fn what_is_written_names_keys_and_nothing_that_is_trusted_without() {
        let written = to_deb822(&origins([("l.list", ONE_LINE)]), Some(KEYRINGS[0]));
        assert_eq!(written.matches("Signed-By: ").count(), 2, "{written}");
        assert!(!written.to_lowercase().contains("trusted"), "{written}");
        let read = origins([("l.sources", written.as_str())]);
        assert_eq!(read[0].signed_by, Some("/usr/share/keyrings/mine.gpg".into()));
        assert_eq!(read[1].signed_by, Some(KEYRINGS[0].into()));
    }
}
