"""Files to parameters and back: Hugging Face and GGUF targets in, checkpoints both ways, exported drafts out."""
