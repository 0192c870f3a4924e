"""Read targets from Hugging Face and GGUF files, read and write checkpoints, import and export drafts."""
