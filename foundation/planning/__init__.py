"""What a run will need and take, before a queue slot is spent: no GPU, about two seconds."""
