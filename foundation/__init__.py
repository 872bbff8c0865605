"""What is learned and how a run goes."""
