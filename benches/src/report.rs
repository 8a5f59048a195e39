//! What was measured, as JSON and as a table. `chart.py` draws the README's picture of the JSON.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde::Serialize;

/// One contestant at one workload.
#[derive(Serialize)]
pub struct Row {
    pub workload: String,
    pub contestant: &'static str,
    pub unit: &'static str,
    #[serde(rename = "median_ns")]
    pub median: f64,
    #[serde(rename = "min_ns")]
    pub min: f64,
    #[serde(rename = "max_ns")]
    pub max: f64,
    pub rounds: usize,
}

impl Row {
    pub fn of(workload: String, contestant: &'static str, unit: &'static str, mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        Self {
            workload,
            contestant,
            unit,
            median: figures[figures.len() / 2],
            min: figures[0],
            max: figures[figures.len() - 1],
            rounds: figures.len(),
        }
    }
}

pub fn write(folder: &Path, rows: &[Row]) -> Result<(), Box<dyn std::error::Error>> {
    fs::create_dir_all(folder)?;
    fs::write(folder.join("results.json"), serde_json::to_string_pretty(rows)?)?;
    fs::write(folder.join("results.md"), table(rows))?;
    Ok(())
}

fn workloads(rows: &[Row]) -> Vec<&str> {
    let mut names: Vec<&str> = Vec::new();
    for row in rows {
        if !names.contains(&row.workload.as_str()) {
            names.push(&row.workload);
        }
    }
    names
}

/// Medians with the spread of the rounds, fastest first, and how many times the fastest each is.
pub fn table(rows: &[Row]) -> String {
    let mut text = String::new();
    for workload in workloads(rows) {
        let mut rows: Vec<_> = rows.iter().filter(|row| row.workload == workload).collect();
        rows.sort_by(|a, b| a.median.total_cmp(&b.median));
        let unit = rows[0].unit;
        writeln!(
            text,
            "\n### {workload}\n\n| | median {unit} | min – max | of the least |\n|---|---:|---:|---:|"
        )
        .unwrap();
        let least = rows[0].median;
        for Row { contestant, median, min, max, .. } in rows {
            writeln!(text, "| {contestant} | {median:.0} | {min:.0} – {max:.0} | {:.2} |", median / least)
                .unwrap();
        }
    }
    text
}
