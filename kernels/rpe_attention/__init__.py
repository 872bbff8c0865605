"""Attention with a contextual relative-position bias."""
