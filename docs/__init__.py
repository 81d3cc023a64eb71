"""Guides, decisions (`adr/`), and reference pages that `python -m docs.generate` writes from the code."""
