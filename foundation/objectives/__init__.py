"""Images to a loss: targets, masks and the objectives made of them."""
