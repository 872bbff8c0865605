"""Several pretrainings under one budget, judged alike: one table and one figure."""
