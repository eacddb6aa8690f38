//! The names under which a row's fields are found.

/// The names under which a row's fields are found.
#[derive(Debug, Clone)]
pub struct Keys {
    /// Name of the prompt's field.
    pub prompt: String,
    /// The caller named the prompt, so a row without it is bad.
    pub prompt_required: bool,
    /// Name of the preferred side.
    pub chosen: String,
    /// Name of the other side.
    pub rejected: String,
    /// Rows hold one completion, named by both sides, and this label, which is one of the further columns.
    pub label: Option<String>,
    /// Further columns to carry.
    pub extra: Vec<String>,
    /// Fields that are not there, whatever the row says.
    pub ignored: Vec<String>,
}

impl Default for Keys {
    fn default() -> Self {
        Self {
            prompt: "prompt".to_owned(),
            prompt_required: false,
            chosen: "chosen".to_owned(),
            rejected: "rejected".to_owned(),
            label: None,
            extra: Vec::new(),
            ignored: Vec::new(),
        }
    }
}

/// A field that some layout reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // each is documented where users meet it, in docs/rows.md
pub enum Field {
    Prompt,
    Chosen,
    Rejected,
    Tools,
    Kwargs,
    PromptIds,
    ChosenIds,
    RejectedIds,
    RefChosen,
    RefRejected,
    ChosenWeights,
    RejectedWeights,
    Messages,
    Conversation,
    Conversations,
    RejectedResponse,
    RejectedMessages,
    ChosenResponse,
    Instruction,
    Input,
    History,
    Question,
    Query,
    Response,
    Output,
    System,
}

/// What a picture, a film or a sound is called; that one is there is all that is looked at.
pub const MEDIA: [&str; 6] = ["image", "images", "video", "videos", "audio", "audios"];

const NAMES: [&str; Field::System as usize + 1] = [
    "prompt",
    "chosen",
    "rejected",
    "tools",
    "chat_template_kwargs",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "ref_chosen_logps",
    "ref_rejected_logps",
    "chosen_weights",
    "rejected_weights",
    "messages",
    "conversation",
    "conversations",
    "rejected_response",
    "rejected_messages",
    "chosen_response",
    "instruction",
    "input",
    "history",
    "question",
    "query",
    "response",
    "output",
    "system",
];
/// Fields of a row before the extra ones.
pub const FIELDS: usize = NAMES.len() + MEDIA.len();
/// Of these the first ones are read by every layout of TRL; text in the others may be a prompt.
pub const TRLS: usize = Field::RejectedWeights as usize + 1;
/// Ids of the completion of a row that holds one.
const COMPLETION_IDS: &str = "completion_ids";
/// No field has this name.
const NOTHING: &str = "\u{0}";

impl Keys {
    /// The name of a field.
    pub fn name(&self, field: Field) -> &str {
        match field {
            Field::Prompt => &self.prompt,
            Field::Chosen => &self.chosen,
            Field::Rejected => &self.rejected,
            Field::ChosenIds | Field::RejectedIds if self.is_single() => COMPLETION_IDS,
            other => NAMES.get(other as usize).copied().unwrap_or_default(),
        }
    }

    /// Whether rows hold one completion and its label, and no pair.
    pub fn is_single(&self) -> bool {
        self.label.is_some()
    }

    /// The fields that some layout reads, in their order.
    pub(super) fn fields(&self) -> impl Iterator<Item = &str> {
        let given: [&str; 3] = [&self.prompt, &self.chosen, &self.rejected];
        let ids = [Field::ChosenIds as usize, Field::RejectedIds as usize];
        let rest = NAMES.into_iter().enumerate().skip(given.len());
        let rest =
            rest.map(
                move |(i, name)| {
                    if self.is_single() && ids.contains(&i) { COMPLETION_IDS } else { name }
                },
            );
        given.into_iter().chain(rest)
    }

    /// The field names in the order of [`super::row::Row::from_fields`].
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.fields().chain(MEDIA).collect();
        for i in 0..names.len() {
            let (before, rest) = names.split_at_mut(i);
            // A name that the caller gave to another field stands for that one alone.
            if let Some(name) = rest.first_mut() {
                let is = |other: &String| other == name;
                let carried = MEDIA.contains(name) && self.extra.iter().any(is);
                if before.contains(name) || self.ignored.iter().any(is) || carried {
                    *name = NOTHING;
                }
            }
        }
        names.extend(self.extra.iter().map(String::as_str));
        names
    }
}
