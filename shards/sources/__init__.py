"""One small reader per corpus."""
