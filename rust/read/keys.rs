//! The names under which a row's fields are found.

/// The names under which a row's fields are found.
#[derive(Debug, Clone)]
pub struct Keys {
    /// Name of the prompt's field.
    pub prompt: String,
    /// The caller named the prompt, so a row without it is bad; otherwise such a row has an implicit prompt.
    pub prompt_required: bool,
    /// Name of the preferred side.
    pub chosen: String,
    /// Name of the other side.
    pub rejected: String,
    /// Further columns to carry.
    pub extra: Vec<String>,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            prompt: "prompt".to_owned(),
            prompt_required: false,
            chosen: "chosen".to_owned(),
            rejected: "rejected".to_owned(),
            extra: Vec::new(),
        }
    }
}

/// Fields of a row before the extra ones.
pub(super) const FIELDS: usize = 10;

impl Keys {
    /// The field names in the order of [`super::row::Row::from_fields`].
    pub fn names(&self) -> Vec<&str> {
        let fields: [&str; FIELDS] = [
            &self.prompt,
            &self.chosen,
            &self.rejected,
            "tools",
            "chat_template_kwargs",
            "prompt_ids",
            "chosen_ids",
            "rejected_ids",
            "ref_chosen_logps",
            "ref_rejected_logps",
        ];
        fields.into_iter().chain(self.extra.iter().map(String::as_str)).collect()
    }
}
