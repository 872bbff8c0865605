"""Scores of frozen or fine-tuned encoders, with controls."""
