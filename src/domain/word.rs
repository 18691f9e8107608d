//! Enums that are words outside: in the API, in rows, in metrics, in the configuration.

/// Makes an enum each variant of which is a word: `ALL` of them, `as_str`, and serde's forms come from one list.
#[doc(hidden)]
#[macro_export]
macro_rules! words {
    ($(#[$meta:meta])* $vis:vis enum $name:ident {
        $($(#[$variant_meta:meta])* $variant:ident = $word:literal,)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        $vis enum $name {
            $($(#[$variant_meta])* #[serde(rename = $word)] $variant,)*
        }

        impl $name {
            /// All of them.
            $vis const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// The word.
            #[must_use]
            $vis const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }

            /// The value of the word; None for another word.
            #[must_use]
            $vis fn of(word: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|known| known.as_str() == word)
            }
        }
    };
}

pub use words;

#[cfg(test)]
mod tests {
    words! {
        /// A trial.
        pub(super) enum Trial {
            /// The first.
            First = "first",
            /// The second.
            Second = "the-second",
        }
    }

    #[test]
    fn a_word_is_the_same_in_every_form() {
        for trial in Trial::ALL {
            let json = serde_json::json!(trial);
            assert_eq!(json, trial.as_str());
            assert_eq!(Trial::of(trial.as_str()), Some(*trial));
            assert_eq!(serde_json::from_value::<Trial>(json).ok(), Some(*trial));
        }
        assert_eq!(Trial::of("third"), None);
    }
}
