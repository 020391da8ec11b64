//! Figures in rows. Those of different protocols never stand together without saying so.

use std::{collections::BTreeSet, fmt};

use crate::metrics::{Figure, Interval, Protocol};

/// One row.
#[derive(Debug, Clone)]
struct Row {
    set: String,
    figure: Figure,
    hash: String,
    protocol: String,
    meaning: String,
}

/// A table of FVD and KVD.
#[derive(Debug, Clone, Default)]
pub struct FigureTable {
    rows: Vec<Row>,
}

impl FigureTable {
    /// Without rows.
    pub fn new() -> Self {
        Self::default()
    }

    /// One set's figure, with the protocol it was measured under and what the set is.
    pub fn row(&mut self, set: &str, figure: &Figure, protocol: &Protocol, meaning: &str) {
        let [real, others] = figure.clips;
        let counts = match figure.clips == [protocol.settings.clips, protocol.settings.generated_clips()] {
            true => "",
            false => &format!("{others} clips against {real} real ones: "),
        };
        self.rows.push(Row {
            set: set.into(),
            figure: figure.clone(),
            hash: protocol.hash(),
            protocol: protocol.settings.name.clone(),
            meaning: format!("{counts}{meaning}"),
        });
    }

    /// How many protocols its figures come from.
    pub fn protocols(&self) -> usize {
        self.rows.iter().map(|row| &row.hash).collect::<BTreeSet<_>>().len()
    }
}

/// `678.62` with its standard deviation, where there are several runs.
fn with_std(value: f64, std: Option<f64>, digits: usize) -> String {
    match std {
        Some(std) => format!("{value:.digits$} ± {std:.digits$}"),
        None => format!("{value:.digits$}"),
    }
}

fn range(interval: Option<Interval>, digits: usize) -> String {
    interval.map_or(String::new(), |[low, high]| format!("[{low:.digits$}, {high:.digits$}]"))
}

impl fmt::Display for FigureTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let several = self.protocols() > 1;
        let mut lines = vec![["", "FVD", "", "KVD", "", "", "protocol"].map(String::from)];
        for Row { set, figure, hash, protocol, meaning } in &self.rows {
            lines.push([
                set.clone(),
                with_std(figure.fvd, figure.fvd_std, 2),
                range(figure.fvd_interval, 1),
                with_std(figure.kvd, figure.kvd_std, 3),
                range(figure.kvd_interval, 2),
                meaning.clone(),
                format!("{protocol} ({hash})"),
            ]);
        }
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        for line in &lines {
            let [set, fvd, fvd_range, kvd, kvd_range, meaning, protocol] = line;
            let [w0, w1, w2, w3, w4, w6] = [0, 1, 2, 3, 4, 6].map(width);
            let mut text = format!("{set:w0$}  {fvd:>w1$} {fvd_range:w2$}  {kvd:>w3$} {kvd_range:w4$}");
            if several {
                text += &format!("  {protocol:w6$}");
            }
            text += &format!("  {meaning}");
            writeln!(f, "{}", text.trim_end())?;
        }
        let figures = || self.rows.iter().map(|row| &row.figure);
        if figures().any(|figure| figure.fvd_interval.is_some()) {
            let runs = if figures().any(|figure| figure.runs.len() > 1) { ", about the mean of all runs" } else { "" };
            writeln!(f, "[…]: 95 % intervals by the jackknife{runs}")?;
        }
        if several {
            writeln!(f, "These figures come from {} protocols: compare only those of one protocol.", self.protocols())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::{DataConfig, DatasetConfig, Folder},
        metrics::{Distances, ProtocolConfig},
    };

    fn protocol(clips: i64) -> Protocol {
        let dataset = DatasetConfig::Folder(Folder { root: "videos".into() });
        let real = DataConfig { dataset, frames: 16, frame_stride: 1, resolution: 64, flip: false, workers: 1 };
        Protocol {
            settings: ProtocolConfig::plain(clips, &real),
            real: real.dataset,
            real_sha256: "00".into(),
            reading: Some(1),
            seed: 0,
            extractor: "I3D".into(),
            extractor_sha256: "00".into(),
            fvd: String::new(),
            kvd: String::new(),
        }
    }

    fn figure(fvd: f64, std: Option<f64>) -> Figure {
        Figure {
            fvd,
            kvd: 1.5,
            fvd_std: std,
            kvd_std: std,
            runs: vec![Distances { fvd, kvd: 1.5 }],
            fvd_interval: Some([fvd - 1.0, fvd + 1.0]),
            kvd_interval: None,
            fvd_extrapolated: fvd / 2.0,
            clips: [96, 96],
        }
    }

    #[test]
    fn one_protocol_is_not_repeated() {
        let mut table = FigureTable::new();
        table.row("samples", &figure(678.62, None), &protocol(96), "generated");
        table.row("frozen", &figure(1234.5, None), &protocol(96), "stands still");
        let text = table.to_string();
        assert!(text.contains("samples") && text.contains("678.62 [677.6, 679.6]"), "{text}");
        assert!(!text.contains("plain") && !text.contains("protocol"), "{text}");
    }

    #[test]
    fn two_protocols_are_said() {
        let mut table = FigureTable::new();
        table.row("samples", &figure(678.62, Some(3.0)), &protocol(96), "");
        table.row("samples", &figure(700.0, None), &protocol(64), "");
        let text = table.to_string();
        assert!(text.contains("678.62 ± 3.00") && text.contains("come from 2 protocols"), "{text}");
        for protocol in [protocol(96), protocol(64)] {
            assert!(text.contains(&protocol.hash()), "{text}");
        }
    }
}
