//! `lvdm config`: every key of every file of settings, with its type, its default and what it means.

use anyhow::Result;

use super::DemoData;
use crate::{
    bench::BenchExperiment,
    experiment::{
        AutoencoderExperiment, DiffusionExperiment, EvaluationExperiment, Keys, LongEvaluationExperiment,
        TransformerExperiment, UserError,
    },
    metrics::ProtocolConfig,
};

/// What the keys of experiment files mean
#[derive(Debug, clap::Args)]
pub struct Config {
    /// A key, as trainer.steps, or one that has others inside, as trainer; without one, the kinds of files are listed
    key: Option<String>,
    /// The whole page docs/configuration.md
    #[arg(long, conflicts_with = "key")]
    markdown: bool,
}

/// The beginning of the page.
const HEAD: &str = "\
# Configuration

Every training, evaluation and benchmark is described by one YAML file, an experiment. This page lists every key of every
kind of file with its type, its default and its meaning. It is printed by `lvdm config --markdown` out of the types that read
the files, and a test holds it to them. `lvdm config trainer.steps` says what one key means.

- A key that is not known, a value of the wrong type, or a number that makes no sense ends the command before anything is
  loaded, with the file, the line and the nearest key that there is.
- Behind the file, a command takes any number of `key.path=value`, which stand in place of what the file says:
  `lvdm train diffusion FILE trainer.batch=4 'sampler={kind: ddim, steps: 20, eta: 0.0}'`. In a list a number chooses:
  `curves.0.name=ours`.
- Where a group of settings has a `kind`, the other keys are those of that kind. `{}` as a default means the group's own
  defaults.
- `null` means that there is none. `<<` merges a mapping into another, as YAML 1.1 does.
- `network` was called `unet` in earlier releases; that name is read too.
- Relative paths start at the folder in which the command runs.
- F are frames, H and W height and width in pixels, h and w those of a latent, C its channels.
";

fn keys() -> Keys {
    Keys::default()
        .of::<AutoencoderExperiment>("`lvdm train autoencoder FILE`")
        .of::<DiffusionExperiment>("`lvdm train diffusion FILE`")
        .of::<TransformerExperiment>("`lvdm train transformer FILE`")
        .of::<EvaluationExperiment>("`lvdm evaluate FILE`")
        .of::<LongEvaluationExperiment>("`lvdm evaluate-long FILE`")
        .of::<ProtocolConfig>("A protocol: `evaluation.protocol`")
        .of::<BenchExperiment>("`lvdm bench FILE`")
        .of::<DemoData>("`data.yaml` of `lvdm demo`")
}

impl Config {
    /// # Errors
    /// [`UserError`] for a key that there is not.
    pub fn run(self) -> Result<()> {
        let keys = keys();
        if self.markdown {
            say!("{HEAD}\n{}", keys.markdown().trim_end());
            return Ok(());
        }
        let Some(key) = self.key else {
            say!("{}", keys.titles().join("\n").replace('`', ""));
            say!("lvdm config KEY says what a key means; lvdm config --markdown lists all.");
            return Ok(());
        };
        // an entry of a list has a number, and the network an older name
        let parts: Vec<&str> = key.split('.').filter(|part| part.parse::<usize>().is_err()).collect();
        let mut found = keys.below(&parts.join("."));
        if let ["unet", rest @ ..] = &parts[..] {
            found.extend(keys.below(&[&["network"], rest].concat().join(".")));
        }
        if found.is_empty() {
            return Err(UserError(format!("no file has a key `{key}`; lvdm config --markdown lists all")).into());
        }
        for (title, keys) in found {
            say!("{}", title.replace('`', ""));
            for key in keys {
                let kinds = if key.kinds.is_empty() { String::new() } else { format!("; of {}", key.kinds.join(", ")) };
                say!("  {} ({}; default: {}{kinds})", key.path, key.r#type.replace('`', ""), key.default);
                say!("      {}", key.meaning);
            }
        }
        Ok(())
    }
}
