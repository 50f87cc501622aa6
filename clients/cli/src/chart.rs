//! A chart for the terminal: load as an area above, instances as steps below, one time axis.
//!
//! Pure: the same points and size always give the same text, every line at most `width` wide.

const EIGHTHS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Minimum readable size.
const WIDTH_MIN: usize = 24;
const HEIGHT_MIN: usize = 7;

/// Draws load (seconds, requests per second) and instances (seconds, count) over the same time.
/// `height` counts all lines: both panels, their titles and the time axis.
pub fn load_and_instances(
    load: &[(f64, f64)],
    instances: &[(f64, u32)],
    width: usize,
    height: usize,
) -> String {
    let (width, height) = (width.max(WIDTH_MIN), height.max(HEIGHT_MIN));
    let Some(time) = Axis::over(load, instances) else {
        return "no load and no instances in this time\n".into();
    };
    let load_top = load.iter().map(|point| point.1).fold(0.0, f64::max);
    let count_top = instances.iter().map(|point| point.1).max().unwrap_or(0);
    let gutter = number(load_top)
        .len()
        .max(number(f64::from(count_top)).len());
    let columns = width - gutter - 2;
    let rows = height - 4;
    // Steps need a row per count, no more; load gets the rest, and at least half.
    let step_rows = (count_top as usize + 1)
        .clamp(2, (rows / 2).max(2))
        .min(rows - 1);
    let load_rows = rows - step_rows;

    let mut lines = vec![format!("{:gutter$}  requests per second", "")];
    lines.extend(area(load, &time, load_top, columns, load_rows, gutter));
    lines.push(format!("{:gutter$}  instances", ""));
    lines.extend(steps(
        instances, &time, count_top, columns, step_rows, gutter,
    ));
    lines.push(axis(gutter, columns));
    lines.push(time_labels(&time, gutter, columns));
    let lines: Vec<&str> = lines.iter().map(|line| line.trim_end()).collect();
    lines.join("\n") + "\n"
}

/// One row of a series, without axes: for views that have little space.
pub fn sparkline(values: &[f64], width: usize) -> String {
    let values = &values[values.len().saturating_sub(width)..];
    let top = values.iter().copied().fold(0.0, f64::max);
    let bar = |value: &f64| match top > 0.0 && *value > 0.0 {
        // Anything above zero must be visible.
        true => EIGHTHS[((value / top * 8.0).round() as usize).clamp(1, 8)],
        false => '▁',
    };
    values.iter().map(bar).collect()
}

struct Axis {
    from: f64,
    to: f64,
}

impl Axis {
    fn over(load: &[(f64, f64)], instances: &[(f64, u32)]) -> Option<Self> {
        let times = || {
            let load = load.iter().map(|point| point.0);
            load.chain(instances.iter().map(|point| point.0))
        };
        let from = times().fold(f64::INFINITY, f64::min);
        let to = times().fold(f64::NEG_INFINITY, f64::max);
        (from.is_finite() && to.is_finite()).then_some(Self {
            from,
            to: if to > from { to } else { from + 1.0 },
        })
    }

    fn column(&self, at: f64, columns: usize) -> usize {
        let share = (at - self.from) / (self.to - self.from);
        ((share * columns as f64) as usize).min(columns - 1)
    }

    /// The time at which a column ends.
    fn end(&self, column: usize, columns: usize) -> f64 {
        self.from + (self.to - self.from) * (column + 1) as f64 / columns as f64
    }
}

/// The mean of each column; a column without a point takes its left neighbour's.
fn means(points: &[(f64, f64)], time: &Axis, columns: usize) -> Vec<f64> {
    let mut sums = vec![(0.0, 0_u32); columns];
    for (at, value) in points {
        let sum = &mut sums[time.column(*at, columns)];
        *sum = (sum.0 + value, sum.1 + 1);
    }
    let mut last = 0.0;
    let mean = |(sum, count): (f64, u32)| {
        if count > 0 {
            last = sum / f64::from(count);
        }
        last
    };
    sums.into_iter().map(mean).collect()
}

fn area(
    points: &[(f64, f64)],
    time: &Axis,
    top: f64,
    columns: usize,
    rows: usize,
    gutter: usize,
) -> Vec<String> {
    let scale = if top > 0.0 { top } else { 1.0 };
    let means = means(points, time, columns);
    let row_of = |row: usize| {
        let below = rows - 1 - row;
        let cell = |mean: &f64| {
            let eighths = (mean / scale * rows as f64 * 8.0).round() as usize;
            EIGHTHS[eighths.saturating_sub(below * 8).min(8)]
        };
        let label = match row {
            0 => number(top),
            _ if row == rows - 1 => "0".into(),
            _ => String::new(),
        };
        let cells: String = means.iter().map(cell).collect();
        format!("{label:>gutter$} ┤{cells}")
    };
    (0..rows).map(row_of).collect()
}

/// The count at the end of each column; before the first point, the first one's.
fn counts(points: &[(f64, u32)], time: &Axis, columns: usize) -> Vec<u32> {
    let mut points = points.to_vec();
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    let first = points.first().map_or(0, |point| point.1);
    let mut next = points.iter().peekable();
    let mut current = first;
    (0..columns)
        .map(|column| {
            let end = time.end(column, columns);
            let last = column + 1 == columns;
            while let Some(point) = next.next_if(|point| last || point.0 < end) {
                current = point.1;
            }
            current
        })
        .collect()
}

fn steps(
    points: &[(f64, u32)],
    time: &Axis,
    top: u32,
    columns: usize,
    rows: usize,
    gutter: usize,
) -> Vec<String> {
    let scale = f64::from(top.max(1));
    let row_of =
        |count: u32| rows - 1 - (f64::from(count) / scale * (rows - 1) as f64).round() as usize;
    let mut grid = vec![vec![' '; columns]; rows];
    let mut before = None;
    for (column, count) in counts(points, time, columns).into_iter().enumerate() {
        let row = row_of(count);
        let previous = before.replace(row).unwrap_or(row);
        // Row 0 is at the top: a smaller row means more instances.
        let (at_previous, at_row) = match previous.cmp(&row) {
            std::cmp::Ordering::Equal => ('─', '─'),
            std::cmp::Ordering::Greater => ('╯', '╭'),
            std::cmp::Ordering::Less => ('╮', '╰'),
        };
        let (upper, lower) = (row.min(previous), row.max(previous));
        for line in grid.iter_mut().take(lower).skip(upper) {
            line[column] = '│';
        }
        grid[previous][column] = at_previous;
        grid[row][column] = at_row;
    }
    let every_count = rows == top as usize + 1;
    let label = |row: usize| match row {
        0 => top.to_string(),
        _ if row == rows - 1 => "0".into(),
        _ if every_count => (top as usize - row).to_string(),
        _ => String::new(),
    };
    let line = |(row, cells): (usize, Vec<char>)| {
        format!(
            "{:>gutter$} ┤{}",
            label(row),
            cells.into_iter().collect::<String>()
        )
    };
    grid.into_iter().enumerate().map(line).collect()
}

fn axis(gutter: usize, columns: usize) -> String {
    format!("{:gutter$} └{}", "", "─".repeat(columns))
}

fn time_labels(time: &Axis, gutter: usize, columns: usize) -> String {
    let clock = |seconds: f64| {
        let seconds = seconds.max(0.0).round() as u64;
        format!("{}:{:02}", seconds / 60, seconds % 60)
    };
    let left = clock(time.from);
    let middle = clock((time.from + time.to) / 2.0);
    let right = clock(time.to);
    let to_middle = (columns / 2).saturating_sub(left.len() + middle.len() / 2);
    let so_far = left.len() + to_middle + middle.len();
    let to_right = columns.saturating_sub(so_far + right.len());
    let space = |count: usize| " ".repeat(count);
    format!(
        "{}{left}{}{middle}{}{right}",
        space(gutter + 2),
        space(to_middle),
        space(to_right)
    )
}

/// A short readable form.
fn number(value: f64) -> String {
    if value >= 1000.0 {
        format!("{:.1}k", value / 1000.0)
    } else if value >= 10.0 || value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn load_is_an_area_and_instances_are_steps_on_the_same_axis() {
        let load: Vec<(f64, f64)> = (0..60)
            .map(|second| (f64::from(second), if second < 30 { 10.0 } else { 40.0 }))
            .collect();
        let instances = [(0.0, 1), (35.0, 3), (50.0, 2)];
        let chart = load_and_instances(&load, &instances, 44, 12);
        let expected = "    requests per second
40 ┤                    ████████████████████
   ┤                    ████████████████████
   ┤                    ████████████████████
 0 ┤████████████████████████████████████████
    instances
 3 ┤                       ╭─────────╮
 2 ┤                       │         ╰──────
 1 ┤───────────────────────╯
 0 ┤
   └────────────────────────────────────────
    0:00              0:30              0:59
";
        assert_eq!(chart, expected, "\n{chart}");
    }

    #[test]
    fn no_line_is_wider_than_asked_and_the_height_is_kept() {
        let load: Vec<(f64, f64)> = (0..5000)
            .map(|s| (f64::from(s), f64::from(s % 977)))
            .collect();
        let instances: Vec<(f64, u32)> = (0..50).map(|s| (f64::from(s) * 100.0, s % 23)).collect();
        for (width, height) in [(24, 7), (80, 16), (200, 40), (31, 9)] {
            let chart = load_and_instances(&load, &instances, width, height);
            assert_eq!(chart.lines().count(), height, "{width}x{height}");
            for line in chart.lines() {
                assert!(line.chars().count() <= width, "{width}x{height}: {line}");
            }
        }
    }

    #[test]
    fn any_points_at_all_can_be_drawn() {
        for (load, instances) in [
            (vec![], vec![]),
            (vec![(5.0, 0.0)], vec![]),
            (vec![], vec![(1.0, 0)]),
            (vec![(0.0, 1e9), (1.0, 0.5)], vec![(0.0, 1000), (1.0, 0)]),
        ] {
            assert!(!load_and_instances(&load, &instances, 0, 0).is_empty());
        }
    }

    #[test]
    fn a_sparkline_shows_the_newest_values() {
        assert_eq!(sparkline(&[9.0, 0.0, 4.0, 8.0], 3), "▁▄█");
        assert_eq!(sparkline(&[0.0, 0.0], 5), "▁▁");
        assert_eq!(sparkline(&[0.001, 100.0], 5), "▁█");
    }
}
