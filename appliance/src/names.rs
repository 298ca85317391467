//! Values as users write them: sizes, rates, durations.

use std::time::Duration;

/// Parses SIZE: digits with an optional K, M, G or T, powers of 1024. The result is in bytes.
pub fn size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        Some((at, 'T' | 't')) => (&text[..at], 40),
        _ => (text, 0),
    };
    let wrong =
        || format!("'{text}' is not a size: digits with an optional K, M, G or T, as in 64K");
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(wrong());
    }
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// Parses a rate: SIZE with an optional `/s`. The result is in bytes a second, never 0.
pub fn rate(text: &str) -> Result<u64, String> {
    match size(text.trim().strip_suffix("/s").unwrap_or(text))? {
        0 => Err("a rate of 0 would never end: leave --rate-limit out for no limit".into()),
        rate => Ok(rate),
    }
}

/// Parses a duration: digits with ms, s or m (s when nothing is said).
pub fn duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let wrong = || format!("'{text}' is not a duration, as in 500ms, 5s or 1m");
    let number: u64 = text[..split].parse().map_err(|_| wrong())?;
    let millis = match &text[split..] {
        "ms" => Some(number),
        "s" | "" => number.checked_mul(1000),
        "m" => number.checked_mul(60_000),
        _ => None,
    };
    millis.map(Duration::from_millis).ok_or_else(wrong)
}

/// Parses a duration for schedules: digits with s, m, h or d (s when nothing is said).
pub fn long_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let wrong = || format!("'{text}' is not a duration, as in 90s, 15m, 2h or 1d");
    let unit = match &text[split..] {
        "s" | "" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(wrong()),
    };
    let number: u64 = text[..split].parse().map_err(|_| wrong())?;
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(wrong)
}

/// Bytes for a person: three digits and a unit, powers of 1024.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ if value < 10.0 => format!("{value:.2} {}", UNITS[unit]),
        _ if value < 100.0 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_follow_the_grammar() {
        assert_eq!(size("64K"), Ok(65536));
        assert_eq!(size("0"), Ok(0));
        assert_eq!(size("2T"), Ok(2 << 40));
        for wrong in ["", "K", "-1", "1.5G", "64KB", "99999999T", "0x10", "１K"] {
            assert!(size(wrong).is_err(), "{wrong}");
        }
        assert_eq!(rate("10M/s"), Ok(10 << 20));
        assert!(rate("0").is_err());
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("5"), Ok(Duration::from_secs(5)));
        assert!(duration("5h").is_err() && duration("s").is_err());
        assert_eq!(long_duration("2h"), Ok(Duration::from_secs(7200)));
        assert!(long_duration("99999999999999999999d").is_err() && long_duration("h").is_err());
    }

    #[test]
    fn bytes_read_well() {
        assert_eq!(human_bytes(0), "0 B");
        assert_eq!(human_bytes(65536), "64.0 KiB");
        assert_eq!(human_bytes(5 << 30), "5.00 GiB");
    }
}
