"""Draft, verify, decode."""
