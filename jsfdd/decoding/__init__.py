"""Draft, verify, decode: speculative decoding of prompts and whole conversations."""
