//! What was measured, as JSON, as a table and as a picture.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use plotters::prelude::*;
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
    chart(&folder.join("results.svg"), rows)
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

/// A bar for each contestant, for the workloads that say most.
fn chart(path: &Path, rows: &[Row]) -> Result<(), Box<dyn std::error::Error>> {
    let shown =
        ["one task in a loop", "64 tasks", "64 in flight from one task", "a caller on another thread"];
    let root = SVGBackend::new(path, (960, 640)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, workload) in root.split_evenly((2, 2)).iter().zip(shown) {
        let mut rows: Vec<_> = rows.iter().filter(|row| row.workload == workload).collect();
        if rows.is_empty() {
            continue;
        }
        rows.sort_by(|a, b| b.median.total_cmp(&a.median));
        let most = rows[0].median * 1.15;
        let mut chart = ChartBuilder::on(area)
            .caption(format!("{workload}: ns a call"), ("sans-serif", 15))
            .margin(8)
            .x_label_area_size(24)
            .y_label_area_size(120)
            .build_cartesian_2d(0.0..most, (0..rows.len()).into_segmented())?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .x_labels(5)
            .y_labels(rows.len())
            .y_label_formatter(&|place| match place {
                SegmentValue::CenterOf(row) => rows.get(*row).map_or("", |row| row.contestant).to_owned(),
                _ => String::new(),
            })
            .draw()?;
        chart.draw_series(rows.iter().enumerate().map(|(place, row)| {
            let color = if row.contestant.starts_with("tenorite") && !row.contestant.ends_with("0.1.2") {
                RGBColor(9, 105, 218)
            } else {
                RGBColor(140, 149, 159)
            };
            let corners = [(0.0, SegmentValue::Exact(place)), (row.median, SegmentValue::Exact(place + 1))];
            let mut bar = Rectangle::new(corners, color.filled());
            bar.set_margin(2, 2, 0, 0);
            bar
        }))?;
    }
    root.present()?;
    Ok(())
}
