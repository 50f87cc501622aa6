//! Reads a request trace: one count per line, plain or gzip; `#` starts a comment.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail};
use flate2::read::MultiGzDecoder;

/// At a step of 1 s a year has 31.5 million lines; a week, a typical trace, has 0.6 million.
const LINES_MAX: usize = 5_000_000;
/// Stops reading early if the file is not a trace.
const LINE_BYTES_MAX: u64 = 256;
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

pub fn read(path: &Path) -> Result<Vec<f64>> {
    let display = path.display();
    let open = || File::open(path).with_context(|| format!("cannot open the trace {display}"));
    let mut magic = Vec::new();
    open()?
        .take(2)
        .read_to_end(&mut magic)
        .with_context(|| format!("cannot read the trace {display}"))?;
    let counts = if magic == GZIP_MAGIC {
        parse(BufReader::new(MultiGzDecoder::new(open()?)))
    } else {
        parse(BufReader::new(open()?))
    };
    counts.with_context(|| format!("the trace {display} cannot be used"))
}

fn parse(mut input: impl BufRead) -> Result<Vec<f64>> {
    let mut counts = Vec::new();
    let mut number = 0;
    let mut line = String::new();
    loop {
        line.clear();
        number += 1;
        let read = (&mut input)
            .take(LINE_BYTES_MAX)
            .read_line(&mut line)
            .with_context(|| format!("line {number} cannot be read"))?;
        if read == 0 {
            break;
        }
        if read as u64 == LINE_BYTES_MAX {
            bail!("line {number} is longer than {LINE_BYTES_MAX} bytes: write one count per line");
        }
        let text = line.split('#').next().unwrap_or_default().trim();
        if text.is_empty() {
            continue;
        }
        match text.parse::<f64>() {
            Ok(count) if count.is_finite() && count >= 0.0 => counts.push(count),
            _ => bail!(
                "line {number}: `{text}` is not a count: write one number per line, 0 or more"
            ),
        }
        if counts.len() > LINES_MAX {
            bail!("more than {LINES_MAX} lines: shorten it or use a longer step");
        }
    }
    if counts.is_empty() {
        bail!("the file is empty: write one count per line");
    }
    Ok(counts)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    #[test]
    fn counts_are_read_and_comments_skipped() {
        let text = "# requests per second\n12\n\n 0 \n3.5 # a fraction\n";
        assert_eq!(parse(text.as_bytes()).unwrap(), [12.0, 0.0, 3.5]);
    }

    #[test]
    fn an_invalid_count_is_refused_with_its_line() {
        for (text, expected) in [
            ("1\nmany\n", "line 2: `many`"),
            ("-1\n", "line 1: `-1`"),
            ("inf\n", "line 1: `inf`"),
            ("1,2\n", "line 1: `1,2`"),
            ("# nothing\n", "is empty"),
        ] {
            let message = parse(text.as_bytes()).unwrap_err().to_string();
            assert!(message.contains(expected), "{text:?}: {message}");
        }
        let long = "1".repeat(1000);
        let message = parse(long.as_bytes()).unwrap_err().to_string();
        assert!(message.contains("line 1 is longer"), "{message}");
    }

    #[test]
    fn gzip_is_detected_by_its_content() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(b"1\n2\n").unwrap();
        file.write_all(&gzip.finish().unwrap()).unwrap();
        assert_eq!(read(file.path()).unwrap(), [1.0, 2.0]);
    }

    #[test]
    fn a_missing_file_is_named() {
        let message = read(Path::new("/nowhere/trace.txt"))
            .unwrap_err()
            .to_string();
        assert!(message.contains("/nowhere/trace.txt"), "{message}");
    }

    #[test]
    fn the_bundled_trace_is_an_hour_of_seconds() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../../deploy/examples/traces/diurnal-1h.txt.gz");
        assert_eq!(read(&path).unwrap().len(), 3600);
    }
}
