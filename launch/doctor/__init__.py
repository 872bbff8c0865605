"""What is looked at on every node before a run: facts of each process, judged together, in one table.

Every file holds one subject: what a process finds out about it (a model that travels as JSON) and what rank 0 makes of
the answers of all (rows). Only `meeting.py` knows torch.distributed. Nothing here imports `kernels` or an engine before
it has been seen whose they are.
"""
