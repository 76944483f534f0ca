//! Messages to prompt text, by the model's chat template.
