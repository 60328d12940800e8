"""Lays a model over a mesh of processes: a file or folder for each plan, and `apply` for their order."""
