"""From chat files to padded batches.

Rows.py reads files, forms.py and chat.py understand rows, template.py renders and masks, batches.py pads.
"""
