//! Figures in rows. Those of different protocols never stand together without saying so.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use crate::metrics::{Figure, Interval, Metric, Protocol};

/// One row.
#[derive(Debug, Clone)]
struct Row {
    set: String,
    figure: Figure,
    hash: String,
    /// Of the metrics that have one for themselves.
    hashes: BTreeMap<Metric, String>,
    protocol: String,
    meaning: String,
}

/// A table of figures, a column a metric.
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
            hashes: figure
                .estimates
                .keys()
                .filter(|metric| !metric.is_default())
                .filter_map(|metric| Some((*metric, protocol.hash_of_metric(*metric)?)))
                .collect(),
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
        let metrics: BTreeSet<Metric> = self.rows.iter().flat_map(|row| row.figure.estimates.keys().copied()).collect();
        let titles = metrics.iter().flat_map(|metric| [metric.title().to_string(), String::new()]);
        let mut lines = vec![[String::new()].into_iter().chain(titles).collect::<Vec<_>>()];
        for Row { set, figure, .. } in &self.rows {
            let cells = metrics.iter().flat_map(|metric| match figure.estimates.get(metric) {
                None => [String::new(), String::new()],
                Some(estimate) => [
                    with_std(estimate.value, estimate.std, metric.digits()),
                    range(estimate.interval, metric.digits() - 1),
                ],
            });
            lines.push([set.clone()].into_iter().chain(cells).collect());
        }
        let protocols = || self.rows.iter().map(|row| format!("{} ({})", row.protocol, row.hash));
        let widest = |texts: &mut dyn Iterator<Item = usize>| texts.max().unwrap_or(0);
        let width = |column: usize| widest(&mut lines.iter().map(|line| line[column].chars().count()));
        let of_protocol = widest(&mut protocols().map(|text| text.chars().count()).chain(["protocol".len()]));
        let last = [("protocol".to_string(), "")].into_iter();
        let last = last.chain(protocols().zip(self.rows.iter().map(|row| row.meaning.as_str())));
        for (line, (protocol, meaning)) in lines.iter().zip(last) {
            let mut text = format!("{:1$}", line[0], width(0));
            for column in (1..line.len()).step_by(2) {
                let [value, range] = [&line[column], &line[column + 1]];
                text += &format!("  {value:>0$} {range:1$}", width(column), width(column + 1));
            }
            if several {
                text += &format!("  {protocol:of_protocol$}");
            }
            text += &format!("  {meaning}");
            writeln!(f, "{}", text.trim_end())?;
        }
        let has_interval = |figure: &Figure| figure.estimates.values().any(|estimate| estimate.interval.is_some());
        let figures = || self.rows.iter().map(|row| &row.figure);
        if figures().any(has_interval) {
            let runs = if figures().any(|figure| figure.runs.len() > 1) { ", about the mean of all runs" } else { "" };
            writeln!(f, "[…]: 95 % intervals by the jackknife{runs}")?;
        }
        if several {
            writeln!(f, "These figures come from {} protocols: compare only those of one protocol.", self.protocols())?;
        }
        for metric in metrics.iter().filter(|metric| !metric.is_default()) {
            let ways = self.rows.iter().filter_map(|row| row.hashes.get(metric)).collect::<BTreeSet<_>>().len();
            if ways > 1 && !several {
                writeln!(f, "The {} is computed in {ways} ways here, which do not compare.", metric.title())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::{DataConfig, DatasetConfig, Folder},
        metrics::{Estimate, ProtocolConfig},
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
            definitions: Default::default(),
        }
    }

    fn figure(fvd: f64, std: Option<f64>) -> Figure {
        let interval = Some([fvd - 1.0, fvd + 1.0]);
        let fvd = Estimate { value: fvd, std, interval, extrapolation: None };
        let kvd = Estimate { value: 1.5, std, ..Estimate::default() };
        let estimates = [(Metric::FVD, fvd), (Metric::KVD, kvd)].into();
        Figure { estimates, runs: Vec::new(), clips: [96, 96] }
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

    /// FVDs compare, and distances of frames by two networks do not.
    #[test]
    fn two_ways_of_one_metric_are_said() {
        let metric = Metric::named("frame_distance").unwrap();
        let of = |network: &str| {
            let definitions = [(Metric::FVD, "as ever".to_string()), (metric, format!("by {network}"))].into();
            Protocol { definitions, ..protocol(96) }
        };
        let mut figure = figure(678.62, None);
        figure.estimates.insert(metric, Estimate { value: 3.0, ..Estimate::default() });
        let mut table = FigureTable::new();
        table.row("one", &figure, &of("a"), "");
        table.row("two", &figure, &of("a"), "");
        assert!(!table.to_string().contains("do not compare"), "{table}");
        table.row("three", &figure, &of("b"), "");
        assert!(
            table.to_string().contains("frame distance is computed in 2 ways") && table.protocols() == 1,
            "{table}"
        );
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
