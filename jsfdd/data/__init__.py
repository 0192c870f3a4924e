"""Conversation files to padded batches: chat.py reads, template.py tokenizes and masks, batches.py buckets and pads."""
