"""Rows to tokens: read, checked, rendered, packed, held out."""
