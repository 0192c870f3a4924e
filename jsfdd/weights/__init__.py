"""From files to parameters: Hugging Face directories and GGUF files in, the models' params tree out."""
