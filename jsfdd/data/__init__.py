"""From chat files to padded batches.

rows.py reads files, forms.py and chat.py interpret rows, template.py renders and masks them, batches.py pads.
"""
