"""What is read: formats, packing, order, streaming."""
