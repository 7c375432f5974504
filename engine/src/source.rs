//! A model on disk: one GGUF file, or a folder with safetensors and `config.json`; or one of a known shape with random
//! weights.

mod synthetic;

use std::path::{Path, PathBuf};

use crate::chat::ChatTemplate;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::gguf::Gguf;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;
pub use synthetic::names as synthetic_names;

/// Where the vocabulary and the chat template come from.
enum Origin {
    Gguf(Box<Gguf>),
    Folder,
    Synthetic,
}

/// An opened model: its shape is read and every tensor it needs is known to be there.
pub struct Source {
    /// Shape and constants.
    pub config: Config,
    /// Mapped tensors.
    pub weights: Weights,
    path: PathBuf,
    origin: Origin,
}

impl Source {
    /// Opens a `.gguf` file or a folder.
    ///
    /// # Errors
    /// One error naming the file, the field or tensor, and what is supported.
    pub fn open(path: &Path) -> Result<Self> {
        let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        let opened = if meta.is_dir() { Self::folder(path)? } else { Self::gguf(path)? };
        opened.weights.check(&opened.config).map_err(|e| e.at(path))?;
        Ok(opened)
    }

    /// A model of the shape that `name` stands for ([`synthetic_names`]), with random weights and no vocabulary.
    ///
    /// # Errors
    /// [`Error::Config`] with the names that exist; [`Error::Io`] when there is no memory.
    pub fn synthetic(name: &str) -> Result<Self> {
        Self::of_shape(name, true)
    }

    /// The same without the numbers, which are 0: for those who ask about sizes.
    ///
    /// # Errors
    /// As of [`Source::synthetic`].
    pub fn outline(name: &str) -> Result<Self> {
        Self::of_shape(name, false)
    }

    fn of_shape(name: &str, filled: bool) -> Result<Self> {
        let (config, weights) = synthetic::model(name, filled)?;
        Ok(Self { config, weights, path: PathBuf::from(name), origin: Origin::Synthetic })
    }

    fn gguf(path: &Path) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            return Err(
                Error::Safetensors("pass the folder that holds it and config.json".into()).at(path)
            );
        }
        let (weights, header) = Weights::from_gguf(path)?;
        let bytes = weights.file(0).unwrap_or_default();
        let config = Config::from_gguf(&header, bytes).map_err(|e| e.at(path))?;
        Ok(Self {
            config,
            weights,
            path: path.to_path_buf(),
            origin: Origin::Gguf(Box::new(header)),
        })
    }

    fn folder(path: &Path) -> Result<Self> {
        let file = path.join("config.json");
        let text = std::fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?;
        let config = Config::from_json(&text).map_err(|e| e.at(&file))?;
        let weights = Weights::from_folder(path)?;
        Ok(Self { config, weights, path: path.to_path_buf(), origin: Origin::Folder })
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header of a GGUF file; `None` for a folder.
    pub fn gguf_header(&self) -> Option<&Gguf> {
        if let Origin::Gguf(header) = &self.origin { Some(header) } else { None }
    }

    /// Builds the tokenizer. Its vocabulary must not be larger than the embedding.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] or [`Error::Io`], with the path.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = match &self.origin {
            Origin::Gguf(header) => Tokenizer::from_gguf(header).map_err(|e| e.at(&self.path))?,
            Origin::Folder => Tokenizer::from_folder(&self.path)?,
            Origin::Synthetic => {
                return Err(Error::Tokenizer("random weights have no vocabulary".into()));
            }
        };
        let (tokens, rows) = (tokenizer.vocab_size(), self.config.vocab);
        if tokens > rows {
            let message = format!("the vocabulary has {tokens} tokens, the embedding {rows} rows");
            return Err(Error::Tokenizer(message).at(&self.path));
        }
        Ok(tokenizer)
    }

    /// Builds the chat template; `None` when the model has none and prompts go in as they are.
    ///
    /// # Errors
    /// [`Error::Template`] or [`Error::Io`], with the path.
    pub fn chat(&self, tokenizer: &Tokenizer) -> Result<Option<ChatTemplate>> {
        let template = match &self.origin {
            Origin::Gguf(header) => ChatTemplate::from_gguf(header, tokenizer),
            Origin::Folder => ChatTemplate::from_folder(&self.path, tokenizer),
            Origin::Synthetic => Ok(None),
        };
        template.map_err(|e| e.at(&self.path))
    }
}
