"""How fast: the two operators worth writing by hand."""
