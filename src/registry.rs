//! Registries: what a file of settings names by `kind`, and the type that holds the settings of each kind.
//!
//! An implementation is one file, with its settings and its trait, and one line in the registry of that trait:
//!
//! ```text
//! registry! {
//!     /// A network's settings, as `network:` gives them.
//!     pub enum NetworkConfig: NetworkSettings, default "unet3d" {
//!         /// The U-Net of the paper.
//!         "unet3d" => UNet3d(UNetConfig),
//!     }
//! }
//! ```
//!
//! The enum reads and writes `{kind: unet3d, …}` with the keys of the settings beside `kind`, is made of any of them by
//! `into()`, and can be asked whatever the trait asks. A `default` is the kind of settings that name none. Settings that
//! stand for several kinds (`"linear" | "scaled_linear" => …`) hold the kind as a field of their own.

use schemars::{Schema, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{DeserializeOwned, Error},
};
use serde_yaml::{Mapping, Value};

/// Declares a registry; the module's documentation says how.
macro_rules! registry {
    (
        $(#[doc = $about:literal])*
        $(#[derive($($derived:ident),+)])?
        pub enum $Registry:ident: $Trait:path $(, default $default:literal)? {
            $( $(#[doc = $doc:literal])* $($kind:literal)|+ => $Variant:ident($Settings:ty) ),+ $(,)?
        }
    ) => {
        $(#[doc = $about])*
        $(#[derive($($derived),+)])?
        #[derive(Debug, Clone, PartialEq)]
        pub enum $Registry { $( $(#[doc = $doc])* $Variant($Settings) ),+ }

        impl $Registry {
            /// The kinds that a file can name.
            pub const KINDS: &'static [&'static str] = &[$( $($kind),+ ),+];
        }

        impl std::ops::Deref for $Registry {
            type Target = dyn $Trait;

            fn deref(&self) -> &Self::Target {
                match self { $( $Registry::$Variant(settings) => settings ),+ }
            }
        }

        $(
            impl From<$Settings> for $Registry {
                fn from(settings: $Settings) -> Self {
                    $Registry::$Variant(settings)
                }
            }
        )+

        impl schemars::JsonSchema for $Registry {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($Registry).into()
            }

            fn json_schema(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
                #[allow(unused_mut, unused_assignments)]
                let mut default: Option<&str> = None;
                $( default = Some($default); )?
                let kinds = vec![
                    $( (&[$($kind),+][..], concat!($($doc, "\n"),*), generator.subschema_for::<$Settings>()) ),+
                ];
                $crate::registry::schema(concat!($($about, "\n"),*), default, kinds)
            }
        }

        impl serde::Serialize for $Registry {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                match self {
                    $( $Registry::$Variant(settings) => {
                        $crate::registry::write(&[$($kind),+], settings, serializer)
                    } ),+
                }
            }
        }

        impl<'de> serde::Deserialize<'de> for $Registry {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                #[allow(unused_mut, unused_assignments)]
                let mut default: Option<&str> = None;
                $( default = Some($default); )?
                let (kind, given) = $crate::registry::read(deserializer, default)?;
                match kind.as_str() {
                    $( $($kind)|+ => {
                        Ok($Registry::$Variant($crate::registry::settings(&[$($kind),+], given)?))
                    } )+
                    other => Err(serde::de::Error::unknown_variant(other, Self::KINDS)),
                }
            }
        }
    };
}
pub(crate) use registry;

const KIND: &str = "kind";

/// The keys of some settings.
pub(crate) struct Given {
    /// With `kind`.
    keys: Mapping,
    /// The kind by default, where none is given.
    default: Option<String>,
}

/// The kind, and all keys with it.
pub(crate) fn read<'de, D: Deserializer<'de>>(
    deserializer: D,
    default: Option<&str>,
) -> Result<(String, Given), D::Error> {
    let mut given = Mapping::deserialize(deserializer)?;
    let by_default = if given.contains_key(KIND) { None } else { default.map(String::from) };
    let kind = match (given.get(KIND), default) {
        (Some(Value::String(kind)), _) => kind.clone(),
        (Some(other), _) => {
            let shown = serde_yaml::to_string(other).unwrap_or_default();
            return Err(D::Error::custom(format!("`kind` is a word, not {}", shown.trim())));
        }
        (None, Some(default)) => default.to_string(),
        (None, None) => return Err(D::Error::missing_field(KIND)),
    };
    given.insert(KIND.into(), kind.clone().into());
    Ok((kind, Given { keys: given, default: by_default }))
}

/// The settings of a kind out of the keys; those of several kinds read `kind` themselves.
pub(crate) fn settings<T: DeserializeOwned, E: Error>(kinds: &[&str], given: Given) -> Result<T, E> {
    let Given { mut keys, default } = given;
    if kinds.len() == 1 {
        keys.remove(KIND);
    }
    serde_yaml::from_value(Value::Mapping(keys)).map_err(|error| match default {
        Some(default) if error.to_string().starts_with("unknown field") => {
            E::custom(format!("{error}; without a `kind` these are the settings of {default}"))
        }
        _ => E::custom(error),
    })
}

/// What a registry is called, its default, and for each implementation its kinds, what it is, and its settings: as JSON
/// Schema.
pub(crate) fn schema(about: &str, default: Option<&str>, kinds: Vec<(&[&str], &str, Schema)>) -> Schema {
    let of_kind = |(kinds, about, settings): (&[&str], &str, Schema)| {
        let required: &[&str] = if default.is_some_and(|default| kinds.contains(&default)) { &[] } else { &[KIND] };
        json_schema!({
            "description": about.trim(),
            "properties": {KIND: {"enum": kinds}},
            "required": required,
            "allOf": [settings],
        })
    };
    json_schema!({"description": about.trim(), "oneOf": kinds.into_iter().map(of_kind).collect::<Vec<_>>()})
}

/// The settings with their kind in front.
pub(crate) fn write<S: Serializer>(
    kinds: &[&str],
    settings: &impl Serialize,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let error = <S::Error as serde::ser::Error>::custom::<String>;
    let own = match serde_yaml::to_value(settings).map_err(|problem| error(problem.to_string()))? {
        Value::Mapping(own) => own,
        Value::Null => Mapping::new(),
        other => return Err(error(format!("settings of a kind are a mapping, not {other:?}"))),
    };
    let kind = own.get(KIND).cloned().unwrap_or_else(|| kinds[0].into());
    let mut all = Mapping::new();
    all.insert(KIND.into(), kind);
    all.extend(own.into_iter().filter(|(key, _)| key.as_str() != Some(KIND)));
    all.serialize(serializer)
}

#[cfg(test)]
mod tests {
    use super::*;

    pub trait Shape {
        fn corners(&self) -> i64;
    }

    #[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, schemars::JsonSchema)]
    #[serde(default, deny_unknown_fields)]
    pub struct Polygon {
        corners: i64,
    }

    impl Shape for Polygon {
        fn corners(&self) -> i64 {
            self.corners
        }
    }

    #[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
    #[serde(rename_all = "snake_case")]
    pub enum Round {
        Circle,
        Ellipse,
    }

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
    pub struct Curve {
        kind: Round,
        size: f64,
    }

    impl Shape for Curve {
        fn corners(&self) -> i64 {
            0
        }
    }

    registry! {
        /// Shapes.
        pub enum ShapeConfig: Shape, default "polygon" {
            "polygon" => Polygon(Polygon),
            "circle" | "ellipse" => Curve(Curve),
        }
    }

    registry! {
        /// Shapes that must be named.
        pub enum Named: Shape {
            "polygon" => Polygon(Polygon),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let shapes: [ShapeConfig; 2] =
            [Polygon { corners: 5 }.into(), Curve { kind: Round::Ellipse, size: 0.5 }.into()];
        let texts = [r#"{"kind":"polygon","corners":5}"#, r#"{"kind":"ellipse","size":0.5}"#];
        for (shape, text) in shapes.iter().zip(texts) {
            assert_eq!(serde_json::to_string(shape).unwrap(), text);
            assert_eq!(serde_json::from_str::<ShapeConfig>(text).unwrap(), *shape);
        }
        assert_eq!((shapes[0].corners(), shapes[1].corners()), (5, 0));
        assert_eq!(ShapeConfig::KINDS, ["polygon", "circle", "ellipse"]);
    }

    #[test]
    fn a_kind_that_is_not_named_is_the_default() {
        assert_eq!(serde_yaml::from_str::<ShapeConfig>("{corners: 3}").unwrap(), Polygon { corners: 3 }.into());
        let error = serde_yaml::from_str::<Named>("{corners: 3}").unwrap_err().to_string();
        assert!(error.contains("missing field `kind`"), "{error}");
    }

    #[test]
    fn an_unknown_kind_is_named_with_those_that_are_known() {
        let error = serde_yaml::from_str::<ShapeConfig>("{kind: circel}").unwrap_err().to_string();
        assert!(error.contains("unknown variant `circel`") && error.contains("`circle`"), "{error}");
        let error = serde_yaml::from_str::<ShapeConfig>("{kind: [1]}").unwrap_err().to_string();
        assert!(error.contains("`kind` is a word"), "{error}");
        let error = serde_yaml::from_str::<ShapeConfig>("{kind: polygon, cornres: 3}").unwrap_err().to_string();
        assert!(error.contains("unknown field `cornres`"), "{error}");
    }
}
